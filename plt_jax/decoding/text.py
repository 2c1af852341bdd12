"""Text in, text out, around token generation."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from tokenizers import Tokenizer

from plt_jax.config import ModelConfig
from plt_jax.data.tokenizer import bos_id, eos_id
from plt_jax.decoding.generation import stream
from plt_jax.decoding.layout import Params
from plt_jax.decoding.sampling import Sampling


def stream_text(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    cache_dtype: str | None = None,
) -> Iterator[str]:
    """The continuation of a prompt that begins a document, piece by piece.

    It ends at the end-of-document token, at max_new_tokens, or where the context is full.

    Args:
      cache_dtype: as in `init_cache`.

    Raises:
      InputError: the prompt is longer than the context, or an argument is out of its range.
    """
    tokens = begin(tokenizer, prompt)
    end = eos_id(tokenizer)
    sampling = sampling._replace(stop_tokens=(*sampling.stop_tokens, end))
    if len(tokens) < config.max_length:
        max_new_tokens = min(max_new_tokens, config.max_length - len(tokens))
    steps = stream(config, params, [tokens], max_new_tokens, sampling, key, cache_dtype=cache_dtype)
    return _pieces(steps, tokenizer)


def begin(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt at the beginning of a document: one begin token, and the text's."""
    # Some tokenizers, Llama 3's for one, would add a second begin token by themselves.
    return [bos_id(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False).ids]


def _pieces(steps: Iterator[np.ndarray], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as its tokens come, never a part of a character."""
    new: list[int] = []
    shown = ""
    for (token,) in steps:
        new.append(int(token))
        text = tokenizer.decode(new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(new)[len(shown) :]
