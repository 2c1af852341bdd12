"""Text in, text out, around token generation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import jax

from plt_jax.config import ModelConfig
from plt_jax.data.tokenizer import TextTokenizer, behind
from plt_jax.decoding.early_exit import ExitRule
from plt_jax.decoding.generation import GenerationRequest, TokenStream
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.weights import DecodeWeights, Params

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream(Iterator[str]):
    """The continuation of a prompt, piece by piece.

    It ends at an end token, before the first of `stops`, at max_new_tokens, or where the context is
    full.
    """

    tokens: TokenStream
    """The tokens that it reads, and the counts of them."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params | DecodeWeights,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        key: jax.Array,
        cache_dtype: str | None = None,
        stops: Sequence[str] = (),
        exit_rule: ExitRule | None = None,
    ):
        """Prefills the prompt.

        Args:
          prompt: tokens from the beginning of a document on, as `TextTokenizer.encode_prompt` gives
            them.
          cache_dtype: the cache's dtype; see `init_cache`.
          stops: strings, which may be names of special tokens.
          exit_rule: where new tokens stop their loops; default none, all loops run.

        Raises:
          InputError: the prompt is longer than the context, or an argument is out of its range.
        """
        sampling = sampling._replace(stop_tokens=(*sampling.stop_tokens, *tokenizer.special.eos))
        if len(prompt) < config.max_length:
            max_new_tokens = min(max_new_tokens, config.max_length - len(prompt))
        request = GenerationRequest(
            *([prompt], max_new_tokens, sampling, key), cache_dtype=cache_dtype, exit_rule=exit_rule
        )
        self.tokens = TokenStream(config, params, request)
        tokens = (int(token) for (token,) in self.tokens)
        # An end token has no text, even if its tokenizer does not call it special.
        own = itertools.takewhile(lambda token: token not in tokenizer.special.eos, tokens)
        self._pieces = decode_incrementally(own, tokenizer, prompt, stops)

    def __next__(self) -> str:
        return next(self._pieces)


def decode_incrementally(
    tokens: Iterable[int],
    tokenizer: TextTokenizer,
    given: Sequence[int] = (),
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Yields the text of tokens as they come behind given ones, never a part of a character.

    The pieces are together `tokenizer.decode_continuation(given, tokens)`, up to the first of
    `stops`. Special tokens have no text. Tokens at the end that make no whole character give
    replacement characters.
    """
    text = TextUntil(tokenizer, given, stops)
    for token in tokens:
        if piece := text.push(token):
            yield piece
        if text.has_stopped:
            return
    if rest := text.rest():
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


class TextUntil:
    """The text of tokens as they come, up to the first of some strings.

    Names of special tokens are part of the text in which these strings are looked for, but not of
    the text that is shown. What may be the beginning of such a string is held back.
    """

    def __init__(self, tokenizer: TextTokenizer, given: Sequence[int], stops: Sequence[str]):
        """Begins behind given tokens.

        Args:
          stops: the strings that end the text; empty ones end nothing.
        """
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._decoder = IncrementalDecoder(tokenizer, given)
        self._held = ""
        """Text that was not shown yet."""
        self._names: list[tuple[int, str]] = []
        """Names of special tokens, each with the length of the held text before it."""
        self.has_stopped = False
        """Whether one of the strings was found."""

    def push(self, token: int) -> str:
        """Takes a token; returns the text that can be shown now."""
        if self.has_stopped:
            return ""
        if token in self._tokenizer.special_ids:
            at = len(self._held) + len(self._decoder.rest())
            self._names.append((at, self._tokenizer.name_of(token)))
        else:
            self._held += self._decoder.push(token)
        return self._release()

    def rest(self) -> str:
        """The text that is left when there are no more tokens."""
        if self.has_stopped:
            return ""
        self._held += self._decoder.rest()
        return self._release(is_last=True)

    def _release(self, is_last: bool = False) -> str:
        """Takes the text that no later token changes from what is held."""
        if not self._stops:
            shown, self._held = self._held, ""
            return shown
        named, spans = self._with_names()
        first = min((at for stop in self._stops if (at := named.find(stop)) >= 0), default=None)
        end = len(named) if is_last else len(named) - self._may_begin_a_stop(named)
        # A longer string that begins earlier may become complete; then that one counts.
        self.has_stopped = first is not None and first <= end
        if first is not None and self.has_stopped:
            end = first
        hidden = sum(min(max(end - start, 0), len(name)) for start, name in spans)
        count = end - hidden
        shown, self._held = self._held[:count], self._held[count:]
        shown_names = sum(start + len(name) <= end for start, name in spans)
        left = self._names[shown_names:]
        self._names = [(max(at - count, 0), name) for at, name in left]
        return shown

    def _with_names(self) -> tuple[str, list[tuple[int, str]]]:
        """The held text with the names of its special tokens, and where each name begins there."""
        named, begin, spans = "", 0, []
        for at, name in self._names:
            if at > len(self._held):
                break  # it stands behind a character that is not complete
            named += self._held[begin:at]
            spans.append((len(named), name))
            named, begin = named + name, at
        return named + self._held[begin:], spans

    def _may_begin_a_stop(self, named: str) -> int:
        """The length of the longest end of a text that is the beginning of a stop."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(named)), 0, -1):
            end = named[len(named) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
