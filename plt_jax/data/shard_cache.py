"""Shards of corpora in buckets: they are fetched to a local disk before they are needed.

The cache is a folder of whole shards, named by their contents, which all processes of a machine
share. It has a bound: the shards that have been unused for longest make room for new ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import queue
import shutil
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from plt_jax.data.shards import Shard, ShardReader
from plt_jax.data.streams import TokenSpan
from plt_jax.errors import FailedError, InputError
from plt_jax.files import UNFINISHED, read_range

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
_SUFFIX = ".array_record"


class ShardCache:
    """A folder of shards of corpora in buckets, which all processes of a machine share."""

    def __init__(self, folder: Path, most_bytes: int):
        """
        Args:
          folder: the folder of the shards; it is made when the first one is fetched.
          most_bytes: bytes that the shards may have together.
        """
        self.folder, self.most_bytes = folder, most_bytes
        self.fetched = 0
        """Shards that this process has fetched."""
        self._fetching: dict[str, Future[Path]] = {}
        self._changing = threading.Lock()
        self._open: weakref.WeakSet[CachedShard] = weakref.WeakSet()

    def check_room(self, shards: Sequence[Shard]) -> None:
        """Checks that the shards of a run can be kept, or at least read.

        Raises:
          InputError: `most_bytes` is too small, or the disk is too full.
        """
        largest, total = max(shard.size for shard in shards), sum(shard.size for shard in shards)
        if self.most_bytes < LEAST_SHARDS * largest:
            raise InputError(
                f"data.cache_gb is {self.most_bytes / 1e9:.3g}, but {LEAST_SHARDS} shards of "
                f"{largest:,} bytes must have room; raise it to {LEAST_SHARDS * largest / 1e9:.3g} "
                "or more, or prepare the corpus with a smaller --shard_mib"
            )
        needed = min(self.most_bytes, total) - self._bytes_kept()
        above = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        free = shutil.disk_usage(above).free
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
        """Begins to fetch a shard, unless it is there or on its way; returns its path to come."""
        path = self.path_of(shard)
        with self._changing:
            if (coming := self._fetching.get(shard.sha256)) is not None:
                return coming
            result: Future[Path] = Future()
            if self._touch(path, shard):
                result.set_result(path)
                return result
            self._fetching[shard.sha256] = result
        _fetches().put((self, source, shard, result))
        return result

    def fetch_now(self, source: Path, shard: Shard, result: Future[Path]) -> None:
        """Fetches a shard, and sets the result of its request."""
        try:
            path = self._fetch(source, shard)
        except BaseException as error:
            with self._changing:
                del self._fetching[shard.sha256]
            result.set_exception(error)
            return
        with self._changing:
            del self._fetching[shard.sha256]
            opened = list(self._open)
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
                    # The right to write it ends with this process, however that ends.
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if not _is_file_of(unfinished, file):
                        continue  # another process has finished it, or removed it, in the meantime
                    with _alone_in(self.folder):
                        self._make_room(shard.size, unfinished)
                        file.truncate(shard.size)  # others count it from now on
                    try:
                        fetch_shard(source, shard, unfinished)
                    except BaseException:
                        unfinished.unlink()
                        raise
                    unfinished.replace(path)
                    with self._changing:
                        self.fetched += 1
            return path
        except OSError as error:
            raise self._unusable(error) from error

    def _touch(self, path: Path, shard: Shard) -> bool:
        """Marks a shard as used now; returns whether it is there, with all its bytes."""
        try:
            if path.stat().st_size != shard.size:
                path.unlink()
                return False
            with contextlib.suppress(PermissionError):  # another user has fetched it
                os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _make_room(self, size: int, but: Path) -> None:
        """Removes the shards that have been unused for longest, until `size` bytes have room.

        Those that are on their way stay.
        """
        kept = [(path, state) for path, state in self._files() if path != but]
        total = sum(state.st_size for _, state in kept)
        for path, state in sorted(kept, key=lambda found: found[1].st_mtime_ns):
            if total + size <= self.most_bytes:
                return
            if path.name.endswith(UNFINISHED) and _is_locked(path):
                continue
            path.unlink(missing_ok=True)
            total -= state.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of the cache, finished or not, and their states."""
        for path in self.folder.iterdir():
            if path.name.endswith((_SUFFIX, UNFINISHED)):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()

    def _bytes_kept(self) -> int:
        if not self.folder.exists():
            return 0
        return sum(state.st_size for _, state in self._files())

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
        try:
            return self._opened().read(begin, length)
        except InputError:
            # The copy may be damaged, or its bytes were on the way.
            if not self._cache.remove_damaged(self._shard):
                raise
            self._reader = None
            return self._opened().read(begin, length)

    def close_if_removed(self) -> None:
        """Closes the file if the cache has it no more: an open file would still fill the disk."""
        if self._reader is not None and not self._cache.path_of(self._shard).exists():
            self._reader = None

    def _opened(self) -> ShardReader:
        reader = self._reader
        for _ in range(_ATTEMPTS):
            if reader is not None:
                break
            path = self._cache.request(self._source, self._shard).result()
            try:
                reader = ShardReader(path, self._shard.tokens, self._dtype, self._source)
            except InputError:
                if path.exists():
                    raise
        if reader is None:
            raise FailedError(
                f"the shards in {self._cache.folder} are removed before they are read; raise "
                "data.cache_gb"
            )
        self._reader = reader
        return reader


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
                raise InputError(
                    f"the shard {source} is missing; bring it back, or run plt_jax.data.prepare "
                    "again as before, which writes missing shards"
                ) from error
            except OSError as error:
                raise FailedError(f"cannot fetch the shard {source}: {error.strerror}") from error
            digest.update(part)
            received += len(part)
            file.write(part)
    if digest.hexdigest() != shard.sha256:
        what = "its SHA-256 is not the manifest's"
        if received != shard.size:
            what = f"it has {received:,} bytes instead of {shard.size:,}"
        raise InputError(
            f"{source} is damaged ({what}); bring back a good copy, or delete it and run "
            "plt_jax.data.prepare again as before, which writes missing shards"
        )


def _is_file_of(path: Path, file: Any) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_locked(path: Path) -> bool:
    """Whether a process is writing an unfinished shard."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes from making room in the folder at the same time."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
