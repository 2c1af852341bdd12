"""Tokenizes documents into one array of token ids, which the cache folder keeps."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
from tokenizers import Encoding

from plt_jax.data.cache import cache_folder, fingerprint, write_atomically
from plt_jax.data.tokenizer import TextTokenizer, refusing_failures
from plt_jax.errors import InputError

_VERSION = "2"
"""Version of how documents are encoded; raise it to stop old cache files from being reused."""
_CHUNK_LENGTH = 2**16
"""Fewest characters of a chunk of a long document, whose chunks all cores encode in parallel."""
_MARGIN = 2**10
"""Characters behind a chunk that are encoded with it, to see whether a token ends where it ends.
They are far more than a tokenizer looks ahead."""
_CHARACTERS_AT_ONCE = 2**21
"""Characters in a batch of chunks: few, because tokenizers' results take a hundred bytes and more
for each character."""
_BETWEEN_WORDS = re.compile(r"(?<=\w)\n(?=\w)")
_LONE_NEWLINE = re.compile(r"(?<=\S)\n(?=\S)")


class TokenizedDocuments(NamedTuple):
    """Documents one after the other, each as bos + its text's tokens + eos."""

    tokens: np.ndarray
    """uint16 or uint32 [M], possibly a memory-mapped file."""
    starts: np.ndarray
    """int64 [documents], index of each document's bos in `tokens`; starts[0] is 0."""


def tokenize(
    documents: Sequence[str], tokenizer: TextTokenizer, cache_dir: str
) -> TokenizedDocuments:
    """Encodes documents, or reads their tokens from the cache folder if they are there.

    Args:
      documents: at least one document.
      tokenizer: one from `plt_jax.data.tokenizer`, which reads the name of a special token in a
        document as text.
      cache_dir: the cache folder, made if need be.

    Raises:
      InputError: the cache cannot be written or holds a broken file, or the tokenizer fails on a
        document.
    """
    key = fingerprint([_VERSION, tokenizer.identity, *documents])
    folder = cache_folder(cache_dir)
    tokens_path, starts_path = folder / f"tokens-{key}.npy", folder / f"starts-{key}.npy"
    if not (tokens_path.exists() and starts_path.exists()):
        encoded = _encode(documents, tokenizer)
        write_atomically(tokens_path, lambda file: np.save(file, encoded.tokens))
        write_atomically(starts_path, lambda file: np.save(file, encoded.starts))
    return TokenizedDocuments(_load(tokens_path, mmap_mode="r"), _load(starts_path))


def encode_documents(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """Yields each document as bos + its text's tokens + eos, in `token_dtype`.

    Documents are read a batch ahead, so there may be any number of them.

    Raises:
      InputError: the tokenizer fails on a document.
    """
    dtype = token_dtype(tokenizer)
    bos = np.array([] if tokenizer.special.bos is None else [tokenizer.special.bos], dtype)
    eos = np.array([tokenizer.eos], dtype)
    pieces = [bos]
    for tokens, last in _encode_chunks(_chunks(documents, tokenizer), tokenizer, dtype):
        pieces.append(tokens)
        if last:
            yield np.concatenate([*pieces, eos])
            pieces = [bos]


def token_dtype(tokenizer: TextTokenizer) -> np.dtype:
    """The smallest little-endian dtype that holds all of a tokenizer's ids: uint16 or uint32."""
    return np.dtype("<u2" if tokenizer.largest_id < 2**16 else "<u4")


def _encode(documents: Sequence[str], tokenizer: TextTokenizer) -> TokenizedDocuments:
    encoded = list(encode_documents(documents, tokenizer))
    lengths = np.array([len(tokens) for tokens in encoded], np.int64)
    return TokenizedDocuments(np.concatenate(encoded), np.cumsum(lengths) - lengths)


class _Chunk(NamedTuple):
    """A part of a document that is encoded by itself."""

    document: str
    """The whole document."""
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.document)

    @property
    def margin(self) -> str:
        """The beginning of the text behind the chunk."""
        return self.document[self.end : self.end + _MARGIN]

    @property
    def with_margin(self) -> str:
        return self.document[self.begin : self.end + _MARGIN]


def _chunks(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[_Chunk]:
    """Yields the chunks of all documents in turn."""
    for document in documents:
        begin = 0
        for end in _cuts(document) if tokenizer.can_be_cut(document) else ():
            yield _Chunk(document, begin, end)
            begin = end
        yield _Chunk(document, begin, len(document))


def _cuts(text: str) -> Iterator[int]:
    """Where a long text may be cut: behind newlines between words, or other visible characters.

    Most tokenizers split there, too. `_encode_chunks` sees whether one does.
    """
    begin = 0
    while True:
        least = begin + _CHUNK_LENGTH
        found = _BETWEEN_WORDS.search(text, least, least + _CHUNK_LENGTH)
        found = found or _LONE_NEWLINE.search(text, least)
        if found is None:
            return
        begin = found.end()
        yield begin


def _encode_chunks(
    chunks: Iterator[_Chunk], tokenizer: TextTokenizer, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields the tokens of each chunk, and whether it is its document's last.

    The tokens of a document's chunks are together those of the document. Where the tokenizer joins
    the end of a chunk with what follows, the two are encoded as one.
    """
    joined: _Chunk | None = None
    """Text whose end was joined with what follows, so that it is not yielded yet."""
    while batch := _take(chunks, _CHARACTERS_AT_ONCE):
        texts = [(chunk.with_margin, chunk.begin > 0) for chunk in batch]
        margins = [(chunk.margin, True) for chunk in batch if not chunk.is_last]
        encodings = iter(_encode_texts([*texts, *margins], tokenizer))
        own = list(itertools.islice(encodings, len(batch)))
        for chunk, encoding in zip(batch, own, strict=True):
            margin = None if chunk.is_last else next(encodings)
            if joined is not None:
                # Twice as much at least each time, so that all is encoded twice on average.
                if chunk.end - joined.end < joined.end - joined.begin and not chunk.is_last:
                    continue
                chunk = chunk._replace(begin=joined.begin)
                (encoding,) = _encode_texts([(chunk.with_margin, chunk.begin > 0)], tokenizer)
                joined = None
            if margin is None:
                yield np.array(encoding.ids, dtype), True
            elif _ends_apart(encoding, margin):
                yield np.array(encoding.ids[: len(encoding) - len(margin)], dtype), False
            else:
                joined = chunk


def _encode_texts(texts: Sequence[tuple[str, bool]], tokenizer: TextTokenizer) -> list[Encoding]:
    """Encodes texts, each with whether it continues another, on all cores."""
    encodings: list[Encoding | None] = [None] * len(texts)
    for continues in {continues for _, continues in texts}:
        own = [index for index, text in enumerate(texts) if text[1] == continues]
        with refusing_failures("the tokenizer fails on a text"):
            chosen = tokenizer.continuing if continues else tokenizer
            done = chosen.library.encode_batch_fast(
                [texts[index][0] for index in own], add_special_tokens=False
            )
        for index, encoding in zip(own, done, strict=True):
            encodings[index] = encoding
    return cast("list[Encoding]", encodings)


def _ends_apart(encoding: Encoding, margin: Encoding) -> bool:
    """Whether the last tokens of a chunk with its margin are those of the margin by itself.

    Then the text behind the chunk has the same tokens whether the chunk is before it or not.
    """
    return encoding.ids[len(encoding) - len(margin) :] == margin.ids


def _take(chunks: Iterator[_Chunk], characters: int) -> list[_Chunk]:
    batch = []
    for chunk in chunks:
        batch.append(chunk)
        characters -= chunk.end - chunk.begin
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
