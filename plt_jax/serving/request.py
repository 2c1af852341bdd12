"""Requests as the engine knows them: tokens in, tokens out."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class SlotSampling(NamedTuple):
    """How a request's tokens are drawn; see `Sampling` and `RowSampling`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    """Is added to the logits of tokens."""
    seed: int = 0
    """32 bits, which with `choice` and the logits decide what is drawn."""
    choice: int = 0
    """Which of several answers to one prompt this is; `generate` draws its row of this number
    alike."""
    loops: int | None = None
    """After how many loops the logits are taken; None for all."""


class Alternatives(NamedTuple):
    """The most likely tokens at a position, in order, and their log-probabilities."""

    tokens: np.ndarray
    logs: np.ndarray


class NewToken(NamedTuple):
    """A token that was generated."""

    token: int
    log: float | None
    """Its log-probability, if it was asked for."""
    alternatives: Alternatives | None
    is_end: bool = False
    """Whether it is a stop token, which ends the text and is no part of it."""


class PromptScore(NamedTuple):
    """The log-probability of a prompt's token behind the ones before it."""

    log: float
    alternatives: Alternatives


class Finish(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    """At a stop token or string."""
    LENGTH = "length"
    """At its number of tokens, or the end of the context."""
    CANCELLED = "cancelled"
    FAILED = "failed"
    """The model's logits were not finite."""
    SHUTDOWN = "shutdown"
    """The server ended."""


class Listener(Protocol):
    """What is told of a request; called by the engine's thread, which must not wait."""

    def take(self, new: NewToken) -> bool:
        """Takes the next token; returns whether the request goes on, which it does not behind a
        stop token."""
        ...

    def take_prompt(self, scores: Sequence[PromptScore]) -> None:
        """Takes the scores of the prompt's tokens from the second one on, before any new token."""
        ...

    def finish(self, why: Finish) -> None:
        """The request has ended."""
        ...


_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to be continued."""

    prompt: Sequence[int]
    """At least one token, and less than the context."""
    max_new_tokens: int
    """0 only scores the prompt."""
    sampling: SlotSampling
    listener: Listener
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the text, and do not belong to it."""
    log_probabilities: bool = False
    """Whether new tokens come with log-probabilities and alternatives."""
    score_prompt: bool = False
    """Whether the prompt's tokens are scored."""
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
