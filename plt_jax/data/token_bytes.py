"""The number of bytes of text that each token of a tokenizer stands for."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.errors import InputError

SPACE = "▁"
"""The character that stands for a space in SentencePiece's vocabularies."""


def token_bytes(tokenizer: TextTokenizer, vocab_size: int) -> np.ndarray:
    """The number of bytes of UTF-8 text that each token stands for.

    Summed over the tokens of a text, they are its length in bytes, provided that the tokenizer does
    not change the text. A tokenizer with a normalizer (as Unicode NFC) or a prefix space counts the
    changed text, and one that lacks rare bytes (such as control characters) omits those.

    Args:
      tokenizer: one with a token for every byte: byte-level, or with byte fallback as Llama 2's.
      vocab_size: V, at least the tokenizer's size.

    Returns:
      int32 [V], 0 for special tokens and for ids without a token.

    Raises:
      InputError: the tokenizer lacks a byte of ordinary text, or has ids of V or above.
    """
    library = tokenizer.library
    vocabulary = library.get_vocab(with_added_tokens=False)
    if _is_byte_level(library, vocabulary):
        size_of = _byte_level_size
    elif _has_byte_fallback(library, vocabulary):
        size_of = _byte_fallback_size
    else:
        # A tokenizer that lacks a byte drops it from the text silently.
        raise InputError(
            "the tokenizer is neither byte-level with all bytes of ordinary text nor has byte "
            "fallback, one of which bits per byte need; give such a one as tokenizer.path, or none "
            "to have one trained"
        )
    tokenizer.check_size(vocab_size)
    lengths = np.zeros(vocab_size, np.int32)
    for token, index in vocabulary.items():
        lengths[index] = size_of(token)
    for index, added in library.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode("utf-8"))
    return lengths


def _byte_level_size(token: str) -> int:
    # In a byte-level vocabulary each character of the alphabet is one byte.
    return len(token) if _alphabet().issuperset(token) else len(token.encode("utf-8"))


def _byte_fallback_size(token: str) -> int:
    return 1 if token in _fallback_tokens() else len(token.replace(SPACE, " ").encode("utf-8"))


def _is_byte_level(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
    decodes = any(step.get("type") == "ByteLevel" for step in _decoder_steps(tokenizer))
    return decodes and _ordinary_bytes().issubset(vocabulary)


def _has_byte_fallback(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
    decodes = any(step.get("type") == "ByteFallback" for step in _decoder_steps(tokenizer))
    encodes = json.loads(tokenizer.to_str())["model"].get("byte_fallback", False)
    return bool(decodes and encodes and _fallback_tokens().issubset(vocabulary))


def _decoder_steps(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    yield from decoder.get("decoders", [decoder])


@functools.cache
def _alphabet() -> frozenset[str]:
    return frozenset(pre_tokenizers.ByteLevel.alphabet())


@functools.cache
def _fallback_tokens() -> frozenset[str]:
    return frozenset(f"<0x{byte:02X}>" for byte in range(256))


@functools.cache
def _ordinary_bytes() -> frozenset[str]:
    """The byte-level alphabet's characters for all bytes in the UTF-8 of printable text, of any
    script.

    Public tokenizers may lack the remaining bytes: those that UTF-8 never has, and control
    characters.
    """
    visible = [9, 10, 13, *range(32, 127)]
    scripts = [*range(0xA0, 0xD800, 7), *range(0xE000, 0x10000, 7), *range(0x1F300, 0x1FB00, 7)]
    text = "".join(map(chr, visible + scripts))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return frozenset(level.pre_tokenize_str(text)[0][0])
