"""Answers that the engine works on: their pieces as they come, from one answer or from several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from plt_jax.serving.listening import Piece, Pieces
from plt_jax.serving.request import Finish, NewToken, PromptScore, Request


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, message: str, code: int = 400, parameter: str | None = None):
        super().__init__(message)
        self.message, self.code, self.parameter = message, code, parameter


class Running(NamedTuple):
    """One answer that the engine works on."""

    prompt: Sequence[int]
    request: Request
    pieces: Pieces


class Answer(NamedTuple):
    """One answer, whole."""

    text: str
    tokens: list[NewToken]
    scores: list[PromptScore]
    finish: Finish


async def collect(run: Running) -> Answer:
    """An answer, when it has ended.

    Raises:
      RefusedError: it failed.
    """
    text, tokens, scores = [], [], []
    async for piece in run.pieces:
        text.append(piece.text)
        tokens += piece.tokens
        scores += piece.scores
        if (failure := failure_of(piece.finish)) is not None:
            raise failure
        if piece.finish is not None:
            return Answer("".join(text), tokens, scores, piece.finish)
    raise AssertionError("an answer ends with a piece that says why")


def failure_of(finish: Finish | None) -> RefusedError | None:
    """The error that a request ended with."""
    if finish is Finish.FAILED:
        return RefusedError("the model failed on this request; see the server's output", 500)
    if finish in (Finish.SHUTDOWN, Finish.CANCELLED):
        return RefusedError("the server is ending", 503)
    return None


async def merged(runs: Sequence[Running]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with its answer's number."""
    if len(runs) == 1:
        async for piece in runs[0].pieces:
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    async def forward(index: int, run: Running) -> None:
        async for piece in run.pieces:
            await queue.put((index, piece))

    tasks = [asyncio.ensure_future(forward(index, run)) for index, run in enumerate(runs)]
    try:
        left = len(runs)
        while left:
            index, piece = await queue.get()
            left -= piece.finish is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()
