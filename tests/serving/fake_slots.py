"""Slots without a model: what each holds, and a next token that depends on all of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from plt_jax.serving.request import Finish, NewToken, PromptScore, SlotSampling

VOCAB = 97


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    """A token that every token before it changes."""
    value = seed
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCAB


def continuation(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


class Drawn(NamedTuple):
    tokens_B: np.ndarray
    logs_B: np.ndarray
    likeliest_BA: np.ndarray
    likeliest_logs_BA: np.ndarray


class FakeSlots:
    """Does what SlotModel does, on lists; refuses what a cache could not do."""

    def __init__(self, slots: int, context: int, chunk: int):
        self.slots, self.context, self.chunk = slots, context, chunk
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.newest: list[int | None] = [None] * slots
        self.seeds = [0] * slots
        self.log: list[tuple[str, int]] = []
        """The programs that ran, each with the tokens that it had."""

    def padded(self, count: int) -> int:
        return count

    def beginning(self, sampling: SlotSampling) -> bytes:
        return b""

    def start(self, slot: int, sampling: SlotSampling, prompt: Sequence[int]) -> None:
        assert len(prompt) <= self.context
        self.held[slot], self.newest[slot], self.seeds[slot] = [], None, sampling.seed

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        is_last: bool,
        following: Sequence[int] | None = None,
    ) -> tuple[Drawn, Any]:
        assert 1 <= len(tokens) <= self.chunk
        self.log.append(("prefill", len(tokens)))
        scores = None
        if following is not None:
            assert len(following) == len(tokens)
            logs = np.array(following, np.float32)
            scores = (logs, np.zeros((len(tokens), 1), np.int32), np.zeros((len(tokens), 1)))
        self.held[slot] += tokens
        assert len(self.held[slot]) <= self.context
        if is_last:
            self.newest[slot] = next_token(self.held[slot], self.seeds[slot])
        return self._drawn([self.newest[slot]]), scores

    def step(self, active_B: np.ndarray, log_probabilities: bool, longest: int) -> Drawn:
        self.log.append(("step", int(active_B.sum())))
        for slot in np.flatnonzero(active_B):
            newest = self.newest[slot]
            assert newest is not None, "a step before the prompt is complete"
            self.held[slot].append(newest)
            assert len(self.held[slot]) <= min(longest, self.context)
            self.newest[slot] = next_token(self.held[slot], self.seeds[slot])
        return self._drawn(self.newest)

    def save_block(self, slot: int, start: int) -> tuple[int, ...]:
        assert len(self.held[slot]) == start + self.chunk
        return tuple(self.held[slot])

    def load_block(self, slot: int, start: int, block: tuple[int, ...]) -> None:
        assert len(block) == start + self.chunk
        assert self.held[slot] == list(block[:start])
        self.held[slot] = list(block)

    def _drawn(self, tokens: Sequence[int | None]) -> Drawn:
        tokens_B = np.array([0 if token is None else token for token in tokens], np.int32)
        B = len(tokens_B)
        return Drawn(tokens_B, np.zeros(B), np.zeros((B, 1), np.int32), np.zeros((B, 1)))


class Recorder:
    """A listener that keeps what it is told, and may end the text itself."""

    def __init__(self, most: int | None = None):
        self.tokens: list[NewToken] = []
        self.scores: list[PromptScore] = []
        self.ends: list[Finish] = []
        self._most = most

    def take(self, new: NewToken) -> bool:
        assert not self.ends
        if new.is_end:
            return False
        self.tokens.append(new)
        return len(self.tokens) != self._most

    def take_prompt(self, scores: Sequence[PromptScore]) -> None:
        assert not self.ends
        self.scores += scores

    def finish(self, why: Finish) -> None:
        self.ends.append(why)

    @property
    def ids(self) -> list[int]:
        return [new.token for new in self.tokens]


class Clock:
    """A clock that goes on by a second each time that it is read."""

    def __init__(self):
        self._seconds = itertools.count()

    def __call__(self) -> float:
        return float(next(self._seconds))


def run_to_end(scheduler, most_ticks: int = 10_000) -> None:
    """Ticks until nothing is left to do."""
    for _ in range(most_ticks):
        if scheduler.is_idle:
            return
        scheduler.tick()
    raise AssertionError("the scheduler does not come to an end")
