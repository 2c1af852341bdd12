"""Shards of corpora in buckets: they are fetched to a local disk before they are needed.

The cache is a folder of whole shards, named by their contents, which all processes of a machine
share. It has a bound: the shards that have been unused for longest make room for new ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import queue
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from plt_jax.data.shards import Shard, ShardReader, damaged_file, missing_file
from plt_jax.data.streams import TokenSpan
from plt_jax.errors import FailedError, InputError
from plt_jax.files.reading import read_range
from plt_jax.files.writing import UNFINISHED
from plt_jax.locks import lock_file

FETCHES = 16
"""Shards that a process fetches at once."""
LEAST_SHARDS = 8
"""Shards of the largest kind that the cache must have room for."""
MOST_AHEAD = 256
"""Most examples whose shards are fetched before they are read."""
_PART_BYTES = 2**23
"""Bytes of a shard that one call of the service brings."""
_ATTEMPTS = 8
"""How often a shard is fetched that other processes remove before it is opened."""
_SUFFIX, _LOCK = ".array_record", ".lock"
_WAIT_SECONDS = 0.1
"""Time between two looks for room, while other processes' shards are on their way."""
_FAILED_SECONDS = 10
"""For how long a shard that cannot be fetched lets all reads fail at once. Readers that read ahead
have queued batches, each of which would wait for the bucket anew, also when the process ends."""


class ShardCache:
    """A folder of shards of corpora in buckets, which all processes of a machine share."""

    def __init__(self, folder: Path, most_bytes: int):
        """
        Args:
          folder: the folder of the shards, made if need be.
          most_bytes: bytes that the shards may have together.
        """
        self.folder, self.most_bytes = folder, most_bytes
        self._fetching: dict[str, Future[Path]] = {}
        self._changing = threading.Lock()
        self._failure: tuple[float, FailedError] | None = None
        self._open: weakref.WeakSet[CachedShard] = weakref.WeakSet()

    def check_room(self, shards: Sequence[Shard]) -> None:
        """Checks that the shards of a corpus can be kept, or at least read.

        Raises:
          InputError: `most_bytes` is too small, the disk is too full, or the folder cannot be used.
        """
        largest = max((shard.size for shard in shards), default=0)
        if self.most_bytes < LEAST_SHARDS * largest:
            raise InputError(
                f"data.cache_gb is {self.most_bytes / 1e9:.3g}, but {LEAST_SHARDS} shards of "
                f"{largest:,} bytes must have room; raise it to {LEAST_SHARDS * largest / 1e9:.3g} "
                "or more, or prepare the corpus with a smaller --shard_mib"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {path: state.st_size for path, state in self._files()}
            missing = sum(shard.size for shard in shards if self.path_of(shard) not in kept)
            needed = min(self.most_bytes - sum(kept.values()), missing)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise InputError(
                f"data.cache_dir {self.folder.parent} cannot keep shards ({error.strerror}); "
                "choose another folder"
            ) from error
        if needed > free:
            raise InputError(
                f"data.cache_dir {self.folder.parent} has {free / 1e9:.3g} GB left, but "
                f"{needed / 1e9:.3g} GB of shards would be kept there; lower data.cache_gb, or "
                "choose another data.cache_dir"
            )

    def examples_ahead(self, shards: Sequence[Shard]) -> int:
        """The number of examples whose shards are to be fetched before they are read: at most a
        quarter of the cache is full of shards that nobody has read."""
        largest = max(shard.size for shard in shards)
        return min(MOST_AHEAD, self.most_bytes // (4 * largest))

    def open(self, source: Path, shard: Shard, dtype: np.dtype) -> CachedShard:
        """A shard in a bucket as a stream of tokens; nothing is fetched before it is read.

        Args:
          source: the shard's object.
          dtype: dtype of the tokens.
        """
        opened = CachedShard(self, source, shard, dtype)
        with self._changing:
            self._open.add(opened)
        return opened

    def path_of(self, shard: Shard) -> Path:
        """Where the cache keeps a shard."""
        return self.folder / (shard.sha256 + _SUFFIX)

    def request(self, source: Path, shard: Shard) -> Future[Path]:
        """Begins to fetch a shard, unless it is there or on its way; returns its path to come.

        Raises:
          FailedError: the cache cannot be used.
        """
        path = self.path_of(shard)
        result: Future[Path] = Future()
        with self._changing:
            if (coming := self._fetching.get(shard.sha256)) is not None:
                return coming
            try:
                is_there = self._touch(path, shard)
            except OSError as error:
                raise self._unusable(error) from error
            if is_there:
                result.set_result(path)
                return result
            if self._failure is not None and time.monotonic() - self._failure[0] < _FAILED_SECONDS:
                result.set_exception(self._failure[1])
                return result
            self._fetching[shard.sha256] = result
        _fetches().put((self, source, shard, result))
        return result

    def fetch_now(self, source: Path, shard: Shard, result: Future[Path]) -> None:
        """Fetches a shard, and sets the result of its request."""
        path, failure = None, None
        try:
            path = self._fetch(source, shard)
        except BaseException as error:
            failure = error
        with self._changing:
            del self._fetching[shard.sha256]
            opened = list(self._open)
            if isinstance(failure, FailedError):
                self._failure = time.monotonic(), failure
        if path is None:
            result.set_exception(failure)
            return
        for other in opened:
            other.close_if_removed()
        result.set_result(path)

    def remove_damaged(self, shard: Shard) -> bool:
        """Removes a shard whose file is not as it was fetched; returns whether it was so."""
        path = self.path_of(shard)
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    return False
            path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process has removed it
            pass
        except OSError as error:
            raise self._unusable(error) from error
        return True

    def _fetch(self, source: Path, shard: Shard) -> Path:
        """Brings a shard to the disk, or waits for the process that does."""
        path = self.path_of(shard)
        unfinished = path.with_name(f".{shard.sha256}{UNFINISHED}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._touch(path, shard):
                with open(unfinished, "ab") as file:
                    # The right to write it, or to remove it, ends with this process.
                    lock_file(file.fileno(), wait=True)
                    if not _is_file_of(unfinished, file):
                        continue  # another process has finished it, or removed it, in the meantime
                    if self._touch(path, shard):
                        # Another process had finished it just before this file was made.
                        unfinished.unlink(missing_ok=True)
                        continue
                    self._reserve(file, shard.size, unfinished)
                    try:
                        fetch_shard(source, shard, unfinished)
                        with self._counting():
                            unfinished.replace(path)
                    except FileNotFoundError:
                        continue  # without locks others fetch it, too, and one has finished it
                    except BaseException:
                        unfinished.unlink(missing_ok=True)
                        raise
            return path
        except OSError as error:
            raise self._unusable(error) from error

    def _touch(self, path: Path, shard: Shard) -> bool:
        """Marks a shard as used now; returns whether it is there, with all its bytes."""
        try:
            if path.stat().st_size != shard.size:
                path.unlink()
                return False
            with contextlib.suppress(OSError):  # another user's, or on a read-only disk
                os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _reserve(self, file: BinaryIO, size: int, path: Path) -> None:
        """Gives a file its size, for which the shards that have been unused for longest make room.

        Those that are on their way stay; if they leave no room, this waits for them.
        """
        while True:
            with self._counting():
                kept = [(found, state) for found, state in self._files() if found != path]
                total, waiting = sum(state.st_size for _, state in kept), False
                for found, state in sorted(kept, key=lambda one: one[1].st_mtime_ns):
                    if total + size <= self.most_bytes:
                        break
                    if found.name.endswith(UNFINISHED):
                        removed = _remove_left(found)
                        waiting = waiting or not removed
                    else:
                        found.unlink(missing_ok=True)
                        removed = True
                    total -= state.st_size if removed else 0
                if total + size <= self.most_bytes or not waiting:
                    file.truncate(size)  # others count it from now on
                    return
            time.sleep(_WAIT_SECONDS)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Keeps other processes from giving files sizes or names: who counts bytes meanwhile would
        miss a file that changes its name."""
        with open(self.folder / _LOCK, "ab") as lock:
            lock_file(lock.fileno(), wait=True)
            yield

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of the cache, finished or not, and their states."""
        for path in self.folder.iterdir():
            if path.name.endswith((_SUFFIX, UNFINISHED)):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()

    def _unusable(self, error: OSError) -> FailedError:
        return FailedError(
            f"cannot use the cache of shards {self.folder} ({error.strerror}); choose another "
            "data.cache_dir, or a smaller data.cache_gb"
        )


@functools.cache
def shard_cache(folder: Path, most_bytes: int) -> ShardCache:
    """The cache in a folder; the corpora of a process share it."""
    return ShardCache(folder, most_bytes)


class CachedShard:
    """A shard in a bucket, which is fetched when it is read, if it was not requested before."""

    def __init__(self, cache: ShardCache, source: Path, shard: Shard, dtype: np.dtype):
        self._cache, self._source, self._shard, self._dtype = cache, source, shard, dtype
        self._reader: ShardReader | None = None

    def __len__(self) -> int:
        return self._shard.tokens

    def read(self, begin: int, length: int) -> TokenSpan:
        """Reads up to `length` tokens from `begin` on, see `TokenStream.read`.

        Raises:
          InputError: the shard is missing or damaged in its bucket.
          FailedError: the bucket does not answer, or the cache cannot be written.
        """
        reader = self._reader or self._open()
        try:
            return reader.read(begin, length)
        except InputError:
            if not self._cache.remove_damaged(self._shard):
                raise
        return self._open().read(begin, length)

    def close_if_removed(self) -> None:
        """Closes the file if the cache has it no more: an open file would still fill the disk."""
        if self._reader is not None and not self._cache.path_of(self._shard).exists():
            self._reader = None

    def _open(self) -> ShardReader:
        for _ in range(_ATTEMPTS):
            path = self._cache.request(self._source, self._shard).result()
            try:
                reader = ShardReader(path, self._shard.tokens, self._dtype, self._source)
            except InputError:
                if not self._cache.remove_damaged(self._shard):
                    raise
                continue  # the copy was damaged, or another process has removed it
            self._reader = reader
            return reader
        raise FailedError(
            f"the shards in {self._cache.folder} are removed before they are read; raise "
            "data.cache_gb"
        )


def fetch_shard(source: Path, shard: Shard, target: Path) -> None:
    """Copies a shard from a bucket into a file that exists.

    Raises:
      InputError: there is no such object, or its contents are not the manifest's.
      FailedError: the bucket does not answer.
      OSError: the file cannot be written.
    """
    digest, received = hashlib.sha256(), 0
    with open(target, "r+b") as file:
        for begin in range(0, shard.size, _PART_BYTES):
            end = min(begin + _PART_BYTES, shard.size)
            try:
                part = read_range(source, begin, end)
            except FileNotFoundError as error:
                raise missing_file(source) from error
            except OSError as error:
                raise FailedError(f"cannot fetch the shard {source}: {error.strerror}") from error
            digest.update(part)
            received += len(part)
            file.write(part)
    if digest.hexdigest() != shard.sha256:
        what = "its SHA-256 is not the manifest's"
        if received != shard.size:
            what = f"it has {received:,} bytes instead of {shard.size:,}"
        raise damaged_file(source, what)


def _is_file_of(path: Path, file: Any) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_left(path: Path) -> bool:
    """Removes an unfinished shard that no process is writing; returns whether it is gone."""
    try:
        with open(path, "r+b") as file:
            if lock_file(file.fileno(), wait=False):
                path.unlink(missing_ok=True)
                return True
    except FileNotFoundError:
        return True
    except OSError:
        pass  # another user's
    return False


@functools.cache
def _fetches() -> queue.SimpleQueue:
    """The shards to fetch, of all caches of this process; threads take them from here.

    An executor would keep a process that wants to end waiting for a bucket that does not answer.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        while True:
            cache, source, shard, result = waiting.get()
            cache.fetch_now(source, shard, result)

    for _ in range(FETCHES):
        threading.Thread(target=work, daemon=True, name="fetch").start()
    return waiting
