"""Shards of a tokenized corpus: ArrayRecord files of token ids.

A record holds RECORD_TOKENS tokens; only the last record of a shard may hold fewer. It stores, in
little-endian order, the number of documents that begin in it as uint32, the place of each one's
first token within the record as uint32, and the tokens. Each record is compressed by itself and has
its own checksum, so any record can be read alone, and damage is found when it is read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without types)
)
from pydantic import Field, NonNegativeInt, PositiveInt

from plt_jax.config.types import Section
from plt_jax.data.streams import TokenSpan
from plt_jax.errors import InputError

RECORD_TOKENS = 4096
_FLUSH_TOKENS = 64 * RECORD_TOKENS
_WRITER_OPTIONS = "group_size:1,zstd:1"  # groups of one record allow random access
_READER_OPTIONS = "readahead_buffer_size:0"
_COUNT = np.dtype("<u4")


Split = Literal["training", "validation"]
SPLITS: tuple[Split, ...] = ("training", "validation")


class Shard(Section):
    """A file of tokens, as the manifest lists it."""

    name: str
    """Name of the file in the corpus's folder."""
    split: Split
    tokens: PositiveInt
    """Tokens in the shard, bos and eos included."""
    documents: PositiveInt
    text_bytes: NonNegativeInt
    """Bytes of the documents' text in UTF-8."""
    size: PositiveInt
    """Bytes of the file."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the file, in hexadecimal."""


def missing_file(path: Path, reason: str | None = None) -> InputError:
    """What is said of a shard that is not there, or for another reason cannot be read."""
    what = "is missing" if reason is None else f"cannot be read ({reason})"
    return InputError(
        f"the shard {path} {what}; bring it back, or run plt_jax.data.prepare again as before, "
        "which writes missing shards"
    )


def damaged_file(path: Path, reason: object) -> InputError:
    """What is said of a file of a corpus that is not as it was written."""
    return InputError(
        f"{path} is damaged ({_first_line(reason)}); bring back a good copy, or delete it and run "
        "plt_jax.data.prepare again as before, which writes missing shards"
    )


class ShardWriter:
    """Writes documents to a new shard, whose file is complete once `close` has returned."""

    def __init__(self, path: Path):
        self.path = path
        self.tokens = 0
        """Tokens added so far."""
        self.documents = 0
        """Documents added so far."""
        self._pieces: list[np.ndarray] = []
        self._starts: list[int] = []
        self._pending = 0
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document.

        Args:
          tokens: unsigned [n], of the same dtype in all of a shard.

        Raises:
          OSError: the file cannot be written.
        """
        self._starts.append(self._pending)
        self._pieces.append(tokens)
        self._pending += len(tokens)
        self.tokens += len(tokens)
        self.documents += 1
        if self._pending >= _FLUSH_TOKENS:
            self._flush(self._pending // RECORD_TOKENS * RECORD_TOKENS)

    def close(self) -> None:
        """Writes the remaining tokens, and waits until the disk has the whole file.

        Raises:
          OSError: the file cannot be written.
        """
        if self._pending:
            self._flush(self._pending)
        self._call(self._writer.close)
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def _flush(self, count: int) -> None:
        tokens, starts = np.concatenate(self._pieces), np.array(self._starts, np.int64)
        for begin in range(0, count, RECORD_TOKENS):
            end = min(begin + RECORD_TOKENS, count)
            inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)] - begin
            record = np.array([len(inside), *inside], _COUNT).tobytes()
            self._call(self._writer.write, record + tokens[begin:end].tobytes())
        self._pieces = [tokens[count:]]
        self._starts = (starts[np.searchsorted(starts, count) :] - count).tolist()
        self._pending = len(self._pieces[0])

    def _call(self, write: Callable[..., None], *arguments: bytes) -> None:
        try:
            write(*arguments)
        except RuntimeError as error:  # array_record raises nothing else
            raise OSError(f"cannot write {self.path}: {_first_line(error)}") from error


class ShardReader:
    """An open shard, of which any span can be read."""

    def __init__(self, path: Path, tokens: int, dtype: np.dtype, source: Path | None = None):
        """Opens a shard.

        Args:
          path: the shard's file.
          tokens: number of tokens that the shard holds.
          dtype: dtype of the tokens.
          source: where the file was copied from, which messages name; default: it is no copy.

        Raises:
          InputError: the file is missing, or does not hold as many records as the tokens fill.
        """
        self._name, self._tokens, self._dtype = source or path, tokens, dtype
        if not path.is_file():  # array_record would fail only at the first read
            raise missing_file(self._name)
        records = -(-tokens // RECORD_TOKENS)
        try:
            self._reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
            found = self._reader.num_records()
        except RuntimeError as error:
            raise damaged_file(self._name, error) from error
        if found != records:
            raise damaged_file(self._name, f"it has {found} records instead of {records}")

    def __len__(self) -> int:
        return self._tokens

    def read(self, begin: int, length: int) -> TokenSpan:
        """Reads up to `length` tokens from `begin` on, see `TokenStream.read`.

        Raises:
          InputError: the shard is damaged.
        """
        end = min(begin + length, self._tokens)
        first, last = begin // RECORD_TOKENS, -(-end // RECORD_TOKENS)
        try:
            records = self._reader.read(first, last)
        except (RuntimeError, IndexError) as error:
            raise damaged_file(self._name, error) from error
        pieces, new = [], np.zeros((last - first) * RECORD_TOKENS, np.int64)
        for number, record in enumerate(records):
            tokens, starts = self._parse(record, first + number)
            new[number * RECORD_TOKENS + starts] = 1
            pieces.append(tokens)
        wanted = slice(begin - first * RECORD_TOKENS, end - first * RECORD_TOKENS)
        return np.concatenate(pieces)[wanted], np.cumsum(new[wanted])

    def check_documents(self, documents: int) -> None:
        """Reads all of the shard.

        Raises:
          InputError: it is damaged, or does not hold so many documents.
        """
        found = 0
        for begin in range(0, self._tokens, _FLUSH_TOKENS):
            _, numbers = self.read(begin, _FLUSH_TOKENS)
            found += int(numbers[-1])
        if found != documents:
            raise damaged_file(self._name, f"it has {found:,} documents instead of {documents:,}")

    def _parse(self, record: bytes, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a record, and the places of documents' first tokens among them.

        Raises:
          InputError: they are not as many as the record must hold.
        """
        try:
            count = int.from_bytes(record[: _COUNT.itemsize], "little")
            starts = np.frombuffer(record, _COUNT, count, _COUNT.itemsize)
            tokens = np.frombuffer(record, self._dtype, -1, _COUNT.itemsize * (1 + count))
        except ValueError as error:
            raise damaged_file(self._name, f"record {number} is no record of tokens") from error
        expected = min(RECORD_TOKENS, self._tokens - number * RECORD_TOKENS)
        if len(tokens) != expected or np.any(starts >= expected):
            raise damaged_file(
                self._name, f"record {number} has {len(tokens):,} tokens instead of {expected:,}"
            )
        return tokens, starts


def _first_line(reason: object) -> str:
    return str(reason).split(";")[0].splitlines()[0][:200]
