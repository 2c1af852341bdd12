"""Tokenizes documents into one array of token ids, which the cache folder keeps."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from plt_jax.data.cache import cache_folder, fingerprint, write_atomically
from plt_jax.data.tokenizer import bos_id, eos_id
from plt_jax.errors import InputError

_CHUNK_LENGTH = 2**16
"""Fewest characters of a chunk of a long document, whose chunks all cores encode in parallel."""
_CHARACTERS_AT_ONCE = 2**21
"""Characters in a batch of chunks: few, because tokenizers' results take a hundred bytes and more
for each character."""
_LONE_NEWLINE = re.compile(r"(?<=\S)\n(?=\S)")


class TokenizedDocuments(NamedTuple):
    """Documents one after the other, each as bos + its text's tokens + eos."""

    tokens: np.ndarray
    """uint16 or uint32 [M], possibly a memory-mapped file."""
    starts: np.ndarray
    """int64 [documents], index of each document's bos in `tokens`; starts[0] is 0."""


def tokenize(documents: Sequence[str], tokenizer: Tokenizer, cache_dir: str) -> TokenizedDocuments:
    """Encodes documents, or reads their tokens from the cache folder if they are there.

    Args:
      documents: at least one document.
      tokenizer: one from `plt_jax.data.tokenizer`, which reads the name of a special token in a
        document as text.
      cache_dir: the cache folder, made if need be.

    Raises:
      InputError: the cache cannot be written or holds a broken file, or the tokenizer lacks a bos
        or eos token.
    """
    key = fingerprint([tokenizer.to_str(), *documents])
    folder = cache_folder(cache_dir)
    tokens_path, starts_path = folder / f"tokens-{key}.npy", folder / f"starts-{key}.npy"
    if not (tokens_path.exists() and starts_path.exists()):
        encoded = _encode(documents, tokenizer)
        write_atomically(tokens_path, lambda file: np.save(file, encoded.tokens))
        write_atomically(starts_path, lambda file: np.save(file, encoded.starts))
    return TokenizedDocuments(_load(tokens_path, mmap_mode="r"), _load(starts_path))


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields each document as bos + its text's tokens + eos, in `token_dtype`.

    Documents are read a batch ahead, so there may be any number of them.

    Raises:
      InputError: the tokenizer lacks a bos or eos token.
    """
    dtype = token_dtype(tokenizer)
    bos, eos = np.array([bos_id(tokenizer)], dtype), np.array([eos_id(tokenizer)], dtype)
    pieces = [bos]
    for tokens, last in _encode_chunks(_chunks(documents), tokenizer, dtype):
        pieces.append(tokens)
        if last:
            yield np.concatenate([*pieces, eos])
            pieces = [bos]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest little-endian dtype that holds all of a tokenizer's ids: uint16 or uint32."""
    largest_id = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return np.dtype("<u2" if largest_id < 2**16 else "<u4")


def _encode(documents: Sequence[str], tokenizer: Tokenizer) -> TokenizedDocuments:
    encoded = list(encode_documents(documents, tokenizer))
    lengths = np.array([len(tokens) for tokens in encoded], np.int64)
    return TokenizedDocuments(np.concatenate(encoded), np.cumsum(lengths) - lengths)


def _chunks(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yields the chunks of all documents in turn, each with whether it is its document's last."""
    for document in documents:
        *others, last = _split(document)
        yield from ((chunk, False) for chunk in others)
        yield last, True


def _split(text: str) -> list[str]:
    """Splits a long text into chunks, after single newlines between visible characters.

    The regular expressions of the usual pre-tokenizers split there too, so the tokens of the chunks
    are those of the whole text.
    """
    chunks, begin = [], 0
    while found := _LONE_NEWLINE.search(text, begin + _CHUNK_LENGTH):
        chunks.append(text[begin : found.end()])
        begin = found.end()
    return [*chunks, text[begin:]]


def _encode_chunks(
    chunks: Iterator[tuple[str, bool]], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, bool]]:
    while batch := _take(chunks, _CHARACTERS_AT_ONCE):
        texts, last = zip(*batch, strict=True)
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for encoding, ends in zip(encodings, last, strict=True):
            yield np.array(encoding.ids, dtype), ends


def _take(chunks: Iterator[tuple[str, bool]], characters: int) -> list[tuple[str, bool]]:
    batch = []
    for chunk, last in chunks:
        batch.append((chunk, last))
        characters -= len(chunk)
        if characters <= 0:
            break
    return batch


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"the cached file {path} is broken; delete it to have it made again"
        ) from error
