"""Paths of a disk or in a bucket: what is there, and whether it can be read and written."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple, cast

from plt_jax.buckets.address import is_in_bucket, refuse_other_schemes
from plt_jax.errors import InputError
from plt_jax.files.writing import UNFINISHED


def to_path(path: str | Path) -> Path:
    """A path of a file system or in a bucket; both have the same methods.

    Raises:
      InputError: the path begins with another scheme than gs://, or the packages for buckets are
        not installed.
    """
    refuse_other_schemes(str(path))
    if not is_in_bucket(path):
        return Path(path)
    from plt_jax.buckets.path import bucket_path  # its packages are an extra

    return bucket_path(str(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or a bucket has objects below this name; False also for a name
    that no file system can have."""
    return path.is_dir() if is_in_bucket(path) else os.path.isdir(path)


def is_there(path: Path) -> bool:
    """Whether there is a file, a folder or an object of this name; False also for a name that no
    file system can have."""
    return path.exists() if is_in_bucket(path) else os.path.exists(path)


def check_reachable(path: Path) -> None:
    """Raises InputError if a path leads into a bucket that does not exist, or cannot be read."""
    if is_in_bucket(path):
        from plt_jax.buckets.service import check_bucket

        check_bucket(path)


def check_writable(folder: Path) -> None:
    """Checks that files can be written into a folder that exists; in a bucket, by writing one.

    Raises:
      InputError: they cannot.
    """
    try:
        if is_in_bucket(folder):
            probe = folder / f".{uuid.uuid4().hex}{UNFINISHED}"
            probe.write_bytes(b"")
            probe.unlink()
        elif not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error


class FileState(NamedTuple):
    """What tells whether a file has changed."""

    size: int
    """Bytes."""
    version: int
    """Changes with every write: on a disk the time of change in nanoseconds, in a bucket the
    object's generation."""


def file_state(path: Path) -> FileState:
    """The state of a file.

    Raises:
      OSError: it does not exist, or the bucket does not answer.
    """
    if is_in_bucket(path):
        from plt_jax.buckets.service import generation_of

        return FileState(path.stat().st_size, generation_of(path))
    found = path.stat()
    return FileState(found.st_size, found.st_mtime_ns)


def states_below(folder: Path) -> dict[str, FileState]:
    """The state of every file in a folder and its subfolders, by its path in it, with slashes.

    In a bucket a single listing tells them, however many there are.

    Raises:
      OSError: the folder cannot be read.
    """
    if is_in_bucket(folder):
        return {name: FileState(*state) for name, state in cast(Any, folder).states_below().items()}
    found: dict[str, FileState] = {}
    for name in files_in(folder):
        with contextlib.suppress(FileNotFoundError):  # it has just been renamed or removed
            found[name] = file_state(folder / name)
    return found


def expand(path: str | Path) -> Path:
    """Replaces `~` or `~NAME` at the beginning of a path by that user's home folder.

    Raises:
      InputError: there is no such user; or see `to_path`.
    """
    try:
        return to_path(path).expanduser()
    except RuntimeError as error:  # which pathlib raises for an unknown user
        raise InputError(
            f"{path} begins with the home folder of an unknown user; give an existing one"
        ) from error


def files_in(folder: Path) -> list[str]:
    """The files in a folder and its subfolders: their paths in it, with slashes, in order."""
    paths = (path for path in folder.rglob("*") if is_in_bucket(path) or path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)
