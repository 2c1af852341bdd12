"""Text in, text out, around token generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from plt_jax.config import ModelConfig
from plt_jax.data.tokenizer import bos_id, eos_id
from plt_jax.decoding.generation import GenerationRequest, stream
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.weights import DecodeWeights, Params


def stream_text(
    config: ModelConfig,
    params: Params | DecodeWeights,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    cache_dtype: str | None = None,
) -> Iterator[str]:
    """Yields the continuation of a prompt that begins a document, piece by piece.

    It ends at the end-of-document token, at max_new_tokens, or where the context is full.

    Args:
      cache_dtype: the cache's dtype; see `init_cache`.

    Raises:
      InputError: at the call: the prompt is longer than the context, or an argument is out of its
        range.
    """
    tokens = encode_prompt(tokenizer, prompt)
    end = eos_id(tokenizer)
    sampling = sampling._replace(stop_tokens=(*sampling.stop_tokens, end))
    if len(tokens) < config.max_length:
        max_new_tokens = min(max_new_tokens, config.max_length - len(tokens))
    request = GenerationRequest([tokens], max_new_tokens, sampling, key, cache_dtype=cache_dtype)
    steps = stream(config, params, request)
    return decode_incrementally((int(token) for (token,) in steps), tokenizer)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt that begins a document: one begin token, and those of the text."""
    # Some tokenizers, such as Llama 3's, would add a second begin token by themselves.
    return [bos_id(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False).ids]


def decode_incrementally(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of tokens as they come, never a part of a character.

    Special tokens have no text. Tokens at the end that make no whole character give replacement
    characters.
    """
    decoder = DecodeStream(skip_special_tokens=True)
    decoded: list[int] = []
    shown = 0
    for token in tokens:
        decoded.append(token)
        piece = decoder.step(tokenizer, token)
        if piece:
            shown += len(piece)
            yield piece
    rest = tokenizer.decode(decoded)[shown:]
    if rest:
        yield rest
