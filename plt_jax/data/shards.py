"""Shards of a prepared corpus: ArrayRecord files of token ids.

A record holds RECORD_TOKENS tokens (the last of a shard fewer), little-endian: how many documents
begin in it, uint32; the places of their first tokens, uint32 each; and the tokens. Records are
compressed one by one and carry their own checksums, so any of them can be read alone, and one that
is damaged is found when it is read.
"""

import os
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from plt_jax.data.streams import Part
from plt_jax.errors import InputError

RECORD_TOKENS = 4096
_FLUSH_TOKENS = 64 * RECORD_TOKENS
_WRITER_OPTIONS = "group_size:1,zstd:1"  # one record a group, for random access
_READER_OPTIONS = "readahead_buffer_size:0"
_COUNT = np.dtype("<u4")


class ShardWriter:
    """Writes documents to a new shard; the file is complete once `close` has returned."""

    def __init__(self, path: Path):
        self.path = path
        self.tokens = 0
        """Written so far."""
        self.documents = 0
        """Written so far."""
        self._pieces: list[np.ndarray] = []
        self._starts: list[int] = []
        self._pending = 0
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document, unsigned [n]; of one dtype in all of a shard.

        Raises:
          OSError: it cannot be written.
        """
        self._starts.append(self._pending)
        self._pieces.append(tokens)
        self._pending += len(tokens)
        self.tokens += len(tokens)
        self.documents += 1
        if self._pending >= _FLUSH_TOKENS:
            self._flush(self._pending // RECORD_TOKENS * RECORD_TOKENS)

    def close(self) -> None:
        """Writes what is left, to the disk itself.

        Raises:
          OSError: it cannot be written.
        """
        if self._pending:
            self._flush(self._pending)
        self._reach(self._writer.close)
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def _flush(self, count: int) -> None:
        tokens, starts = np.concatenate(self._pieces), np.array(self._starts, np.int64)
        for begin in range(0, count, RECORD_TOKENS):
            end = min(begin + RECORD_TOKENS, count)
            inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)] - begin
            record = np.array([len(inside), *inside], _COUNT).tobytes()
            self._reach(self._writer.write, record + tokens[begin:end].tobytes())
        self._pieces = [tokens[count:]]
        self._starts = (starts[np.searchsorted(starts, count) :] - count).tolist()
        self._pending = len(self._pieces[0])

    def _reach(self, write, *arguments) -> None:
        try:
            write(*arguments)
        except RuntimeError as error:  # array_record has no other
            raise OSError(f"cannot write {self.path}: {_first_line(error)}") from error


class ShardReader:
    """A shard, opened to read any part of it."""

    def __init__(self, path: Path, tokens: int, dtype: np.dtype):
        """Opens a shard.

        Args:
          tokens: how many it holds.
          dtype: of the tokens.

        Raises:
          InputError: it is not there, or holds other than this many records.
        """
        self._path, self._tokens, self._dtype = path, tokens, dtype
        if not path.is_file():  # array_record would say so at the first read, with a stack trace
            raise InputError(f"the shard {path} is missing; bring it back, or prepare it again")
        records = -(-tokens // RECORD_TOKENS)
        try:
            self._reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
            found = self._reader.num_records()
        except RuntimeError as error:
            raise self._damaged(error) from error
        if found != records:
            raise self._damaged(f"it has {found} records instead of {records}")

    def __len__(self) -> int:
        return self._tokens

    def read(self, begin: int, length: int) -> Part:
        """The tokens from `begin` on, up to `length`, as TokenStream has it.

        Raises:
          InputError: the shard is damaged.
        """
        end = min(begin + length, self._tokens)
        first, last = begin // RECORD_TOKENS, -(-end // RECORD_TOKENS)
        try:
            records = self._reader.read(first, last)
        except (RuntimeError, IndexError) as error:
            raise self._damaged(error) from error
        pieces, new = [], np.zeros((last - first) * RECORD_TOKENS, np.int64)
        for number, record in enumerate(records):
            count = int.from_bytes(record[: _COUNT.itemsize], "little")
            starts = np.frombuffer(record, _COUNT, count, _COUNT.itemsize)
            new[number * RECORD_TOKENS + starts] = 1
            pieces.append(np.frombuffer(record, self._dtype, -1, _COUNT.itemsize * (1 + count)))
        wanted = slice(begin - first * RECORD_TOKENS, end - first * RECORD_TOKENS)
        return np.concatenate(pieces)[wanted], np.cumsum(new[wanted])

    def _damaged(self, reason: object) -> InputError:
        return InputError(
            f"the shard {self._path} is damaged ({_first_line(reason)}); bring back a good copy, "
            "or delete it and run plt_jax.data.prepare again as before, which makes what is missing"
        )


def _first_line(reason: object) -> str:
    return str(reason).split(";")[0].splitlines()[0][:200]
