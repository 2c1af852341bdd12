"""From a request's tokens to pieces of text that the HTTP face sends."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.decoding.text import TextUntil
from plt_jax.serving.request import Finish, NewToken, PromptScore

_logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A part of an answer."""

    text: str = ""
    tokens: Sequence[NewToken] = ()
    """The tokens that were drawn since the piece before."""
    scores: Sequence[PromptScore] = ()
    """Of the prompt's tokens, if they were asked for."""
    finish: Finish | None = None
    """Why the answer has ended; the last piece has it."""


class TextListener:
    """Decodes the tokens of one request, ends it at its strings, and sends pieces of text.

    The engine's thread calls it; `send` must be safe there.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        stops: Sequence[str],
        send: Callable[[Piece], None],
    ):
        self._arguments, self._send = (tokenizer, prompt, stops), send
        self._held: list[NewToken] = []
        """Tokens that no piece has told of."""

    @functools.cached_property
    def _text(self) -> TextUntil:
        # Made at the first token: a request that is refused need not decode its prompt.
        return TextUntil(*self._arguments)

    def take(self, new: NewToken) -> bool:
        self._held.append(new)
        text = "" if new.is_end else self._text.push(new.token)
        if text:
            self._flush(text)
        return not (new.is_end or self._text.has_stopped)

    def take_prompt(self, scores: Sequence[PromptScore]) -> None:
        self._send(Piece(scores=scores))

    def finish(self, why: Finish) -> None:
        rest = ""
        if why in (Finish.STOP, Finish.LENGTH):
            try:
                rest = self._text.rest()
            except BaseException:  # a panic of the tokenizers is no Exception
                _logger.exception("the end of a request's text cannot be decoded")
                why = Finish.FAILED
        if why is Finish.LENGTH and self._text.has_stopped:
            why = Finish.STOP  # the last character was the end of such a string
        self._flush(rest, why)

    def _flush(self, text: str, finish: Finish | None = None) -> None:
        held, self._held = self._held, []
        self._send(Piece(text, held, finish=finish))


class Pieces:
    """The pieces of one answer, sent by the engine's thread and read by the event loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()

    def send(self, piece: Piece) -> None:
        """Adds a piece, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:  # the loop was closed, so nobody reads
            return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self._queue.get()
            yield piece
            if piece.finish is not None:
                return
