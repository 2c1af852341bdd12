"""Paths of objects in buckets."""

from __future__ import annotations

import fnmatch
import functools
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from etils.epath.gpath import PosixGPath

from plt_jax.buckets.address import SCHEME
from plt_jax.buckets.service import file_system, patiently, prepare_packages
from plt_jax.errors import InputError

PIECE_BYTES = 2**24
"""The bytes of an object that are fetched by one request."""


def bucket_path(path: str) -> Path:
    """A path in a bucket, with the methods of `pathlib.Path` that files and folders of a run need.

    Raises:
      InputError: the packages for buckets are not installed, or the path names no bucket.
    """
    name, _, inside = path.removeprefix(SCHEME).partition("/")
    parts = [part for part in inside.split("/") if part]
    if not name or {".", ".."} & {name, *parts}:
        raise InputError(f"{path} is not {SCHEME}BUCKET/PATH")
    prepare_packages()
    # It is no pathlib.Path, but has its methods, for type checkers as for readers.
    return cast(Path, BucketPath("/".join([SCHEME + name, *parts])))


class BucketPath(PosixGPath):
    """epath's path, completed by methods of pathlib; failures are OSErrors, and calls that the
    bucket does not answer are repeated."""

    def exists(self) -> bool:
        return patiently(self, super().exists)

    def is_dir(self) -> bool:
        return patiently(self, super().is_dir)

    def is_file(self) -> bool:
        return patiently(self, lambda: file_system().isfile(str(self)))

    def is_symlink(self) -> bool:
        return False

    def absolute(self) -> BucketPath:
        return self

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    def expanduser(self) -> BucketPath:
        return self

    def iterdir(self) -> Iterator[BucketPath]:
        # The object of the folder's own name, which some programs make, is none in it.
        names = patiently(self, lambda: self._backend.listdir(str(self)))
        return (self / name for name in names if name)

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        return iter(patiently(self, lambda: list(super(BucketPath, self).glob(pattern))))

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """The objects below this name whose last part matches a pattern."""
        found = patiently(self, lambda: file_system().find(str(self)))
        paths = (type(self)(SCHEME + name) for name in found if not name.endswith("/"))
        return (path for path in paths if fnmatch.fnmatchcase(path.name, pattern))

    def states_below(self) -> dict[str, tuple[int, int]]:
        """The size in bytes and the generation of every object below this name, by its path from
        here; one listing tells them all. Objects that stand for folders are left out.

        Raises:
          InputError: an object has a name that no file can have, as a//b or a/../b.
        """
        found = patiently(self, lambda: file_system().find(str(self), detail=True))
        prefix = str(self).removeprefix(SCHEME) + "/"
        states = {}
        for name, about in found.items():
            inside = name.removeprefix(prefix)
            if inside == name or inside.endswith("/") or not inside:
                continue
            if {"", ".", ".."} & set(inside.split("/")):
                raise InputError(f"{SCHEME}{name} is not the name of a file; rename the object")
            states[inside] = (int(about["size"]), int(about["generation"]))
        return states

    def stat(self) -> os.stat_result:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = patiently(self, super().stat)
        kind = stat.S_IFDIR if found.is_directory else stat.S_IFREG
        times = (found.mtime or 0,) * 3
        return os.stat_result((kind | 0o644, 0, 0, 1, 0, 0, found.length or 0, *times))

    def mkdir(self, *_, **__) -> None:
        """Does nothing: a bucket has no folders."""

    def open(self, mode: str = "r", **_) -> Any:
        """Opens an object to read its bytes; `write_bytes` writes one."""
        if mode != "rb":
            raise io.UnsupportedOperation(f"an object in a bucket is not opened by {mode!r}")
        return io.BufferedReader(_Reader(self), 2**22)

    def read_bytes(self) -> bytes:
        return patiently(self, lambda: file_system().cat_file(str(self)))

    def read_range(self, first: int, end: int) -> bytes:
        """The bytes from position `first` to before `end`, in pieces that are fetched at once."""
        if first >= end:
            return b""
        starts = list(range(first, end, PIECE_BYTES))
        ends = [*starts[1:], end]
        names = [str(self)] * len(starts)
        fetch = functools.partial(file_system().cat_ranges, names, starts, ends, on_error="raise")
        return b"".join(patiently(self, fetch))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        patiently(self, lambda: file_system().pipe_file(str(self), data))
        return len(data)

    def upload(self, file: Path) -> None:
        """Writes a file of a disk, of any size."""
        patiently(self, lambda: file_system().put_file(str(file), str(self)))

    def write_text(self, data: str, encoding: str | None = None, *_, **__) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            patiently(self, lambda: file_system().rm_file(str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        for path in self.rglob("*"):  # one by one: an interrupted removal can be repeated
            path.unlink(missing_ok=True)

    def rename(self, target: Any) -> BucketPath:
        """Copies an object, or all below this name, and removes the old ones."""
        target = type(self)(target)
        for path in list(self.rglob("*")):
            inside = str(path).removeprefix(str(self))
            copy = functools.partial(file_system().cp_file, str(path), str(target) + inside)
            patiently(self, copy)
        self.rmtree()
        return target


class _Reader(io.RawIOBase):
    """An object as a stream of bytes, of which any range can be read."""

    def __init__(self, path: Any):
        self._path, self._position = path, 0
        self._size = path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(origin + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        content = self._path.read_range(self._position, self._size)
        self._position += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        content = self._path.read_range(self._position, end)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
