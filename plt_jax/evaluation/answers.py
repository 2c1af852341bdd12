"""What a task of the harness asks of a generation, and the text that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.text import TextUntil
from plt_jax.errors import InputError

MAX_NEW_TOKENS = 256  # the harness's own default
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names by which tasks set the number of new tokens."""


class GenerationSettings(NamedTuple):
    """What a request of the harness asks for."""

    until: Sequence[str]
    """Texts that end an answer; names of special tokens are texts, too."""
    sampling: Sampling
    most: int
    """The largest number of new tokens."""


def read_settings(settings: dict[str, Any], ends: Sequence[int]) -> GenerationSettings:
    """Reads the settings of a request.

    Args:
      ends: the end tokens.

    Raises:
      InputError: a setting is unknown.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    limits = [int(left.pop(name)) for name in LIMITS if name in left]
    most = limits[0] if limits else MAX_NEW_TOKENS
    temperature = left.pop("temperature", None)
    sampled = left.pop("do_sample", bool(temperature))
    temperature = float(1.0 if temperature is None else temperature) if sampled else 0.0
    top_k, top_p = int(left.pop("top_k", 0) or 0), float(left.pop("top_p", 1.0) or 1.0)
    if left:
        raise InputError(
            f"the generation setting {next(iter(left))} is unknown; known are until, temperature, "
            f"do_sample, top_k, top_p, {', '.join(LIMITS)}"
        )
    sampling = Sampling(temperature, top_k, top_p, stop_tokens=tuple(ends))
    sampling.check()
    return GenerationSettings(until, sampling, most)


class Answer:
    """The answer to one prompt, while it is generated."""

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int], until: Sequence[str]):
        self._ends, self._special = tokenizer.special.eos, tokenizer.special_ids
        self._text = TextUntil(tokenizer, prompt, until)
        self._shown = ""
        self._at_end = False

    def push(self, token: int) -> None:
        """Adds a token, unless the answer has met an end token."""
        if self._at_end:
            return
        self._at_end = token in self._ends
        # The name of an end token may itself be one of the texts that end an answer.
        if not self._at_end or token in self._special:
            self._shown += self._text.push(token)

    @property
    def has_ended(self) -> bool:
        """Whether no further token belongs to the answer."""
        return self._at_end or self._text.has_stopped

    def close(self) -> str:
        """The answer, when there are no more tokens: the text before the first stop, without names
        of special tokens."""
        return self._shown + self._text.rest()
