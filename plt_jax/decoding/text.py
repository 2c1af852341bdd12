"""Text in, text out, around token generation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import jax

from plt_jax.config import ModelConfig
from plt_jax.data.tokenizer import TextTokenizer, behind
from plt_jax.decoding.generation import GenerationRequest, stream
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.weights import DecodeWeights, Params

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def stream_text(
    config: ModelConfig,
    params: Params | DecodeWeights,
    tokenizer: TextTokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    cache_dtype: str | None = None,
) -> Iterator[str]:
    """Yields the continuation of a prompt, piece by piece.

    It ends at an end token, at max_new_tokens, or where the context is full.

    Args:
      prompt: tokens from the beginning of a document on, as `TextTokenizer.encode_prompt` gives
        them.
      cache_dtype: the cache's dtype; see `init_cache`.

    Raises:
      InputError: at the call: the prompt is longer than the context, or an argument is out of its
        range.
    """
    sampling = sampling._replace(stop_tokens=(*sampling.stop_tokens, *tokenizer.special.eos))
    if len(prompt) < config.max_length:
        max_new_tokens = min(max_new_tokens, config.max_length - len(prompt))
    request = GenerationRequest([prompt], max_new_tokens, sampling, key, cache_dtype=cache_dtype)
    tokens = (int(token) for (token,) in stream(config, params, request))
    # An end token has no text, even if its tokenizer does not call it special.
    own = itertools.takewhile(lambda token: token not in tokenizer.special.eos, tokens)
    return decode_incrementally(own, tokenizer, prompt)


def decode_incrementally(
    tokens: Iterable[int], tokenizer: TextTokenizer, given: Sequence[int] = ()
) -> Iterator[str]:
    """Yields the text of tokens as they come behind given ones, never a part of a character.

    The pieces are together `tokenizer.decode_continuation(given, tokens)`. Special tokens have no
    text. Tokens at the end that make no whole character give replacement characters.
    """
    decoder = IncrementalDecoder(tokenizer, given)
    pieces = (decoder.push(token) for token in tokens)
    yield from filter(None, pieces)
    if rest := decoder.rest():
        yield rest


class IncrementalDecoder:
    """Decodes a few tokens at a time, which decode as they do behind all others.

    `tokenizers`' own DecodeStream gives other text behind a prompt that ends within a character,
    and where byte tokens make no character.
    """

    def __init__(self, tokenizer: TextTokenizer, given: Sequence[int]):
        self._tokenizer = tokenizer
        self._tokens = list(given)
        """The tokens from which the next text is decoded; the first ones have been shown."""
        self._shown = tokenizer.decode(self._tokens)
        self._settled = 0
        """How many of the tokens have text that no later token changes."""

    def push(self, token: int) -> str:
        """Takes a token; returns the text that no later token can change, or nothing."""
        if token in self._tokenizer.special_ids:
            return ""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if self._may_change(text):
            return ""
        new = behind(self._shown, text)
        later = self._tokens[self._settled :]
        # A decoder treats the beginning of a text in its own way, so one that is shown stays.
        if self._tokenizer.decode(later):
            self._tokens = later
        self._settled = len(self._tokens)
        self._shown = self._tokenizer.decode(self._tokens)
        return new

    def rest(self) -> str:
        """The text that is left when there are no more tokens."""
        return behind(self._shown, self._tokenizer.decode(self._tokens))

    def _may_change(self, text: str) -> bool:
        """Whether the last tokens can make another character with the next ones."""
        last = self._tokenizer.name_of(self._tokens[-1])
        return text.endswith(_REPLACEMENT) or _BYTE_TOKEN.fullmatch(last) is not None
