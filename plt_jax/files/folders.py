"""Folders are made whole or not at all, copied where a library knows no buckets, and removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from plt_jax.buckets.address import is_in_bucket
from plt_jax.errors import InputError
from plt_jax.files.paths import check_reachable, files_in, to_path


def check_new_folder(path: str | Path) -> None:
    """Raises InputError if `path` is a file, a link or a folder that is not empty, or cannot be
    made."""
    path = to_path(path).absolute()
    check_reachable(path)
    if not is_in_bucket(path) and os.path.islink(path):  # False also for an impossible name
        raise InputError(f"{path} is a link; give the folder itself")
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the name {path} is not UTF-8; choose another destination") from error
    try:
        entries = list(path.iterdir())
    except FileNotFoundError:
        entries = []
    except NotADirectoryError as error:
        raise InputError(f"{path} is a file, or below one; choose another destination") from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if entries:
        raise InputError(f"{path} is not empty; choose another destination")
    if is_in_bucket(path):
        return
    above = next(parent for parent in path.parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise InputError(f"cannot write {path}: {above} is not writable")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new folder, which gets the name `path` if the block ends without an error.

    During the block it has a temporary name beside `path`. After an error it is removed, with the
    parent folders that were made for it. In a bucket, where nothing can be renamed, it has its own
    name from the beginning: its last file must be the one that makes it complete.

    Raises:
      InputError: `path` is refused by `check_new_folder`, or cannot be written.
    """
    check_new_folder(path)
    path = to_path(path).absolute()
    in_bucket = is_in_bucket(path)
    unfinished = path
    if not in_bucket:
        unfinished = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:8]}")
    made = [] if in_bucket else [parent for parent in path.parents if not parent.exists()]
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if not in_bucket:
            unfinished.rename(path)  # which replaces an empty folder
    except BaseException as error:
        remove_folder(unfinished)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise InputError(f"cannot write {path}: {reason}") from error
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's contents.

    Raises:
      InputError: the source cannot be read.
      OSError: the target cannot be written.
    """
    try:
        file = source.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    with file:
        if not is_in_bucket(target):
            with target.open("wb") as copy:
                shutil.copyfileobj(file, copy, 2**24)
        elif is_in_bucket(source):
            target.write_bytes(file.read())
        else:
            cast(Any, target).upload(source)


@contextlib.contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """Yields where a library may write a file that knows no buckets: the path itself, or for an
    object in a bucket a temporary file, which is sent up if the block ends without an error.

    Raises:
      OSError: the file cannot be sent up.
    """
    if not is_in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="plt_jax-") as folder:
        yield Path(folder) / path.name
        copy_file(Path(folder) / path.name, path)


@contextlib.contextmanager
def local_folder(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Yields where a library may read a folder that knows no buckets: the folder itself, or a
    temporary copy of one in a bucket.

    Args:
      wanted: whether a file that lies directly in it, by its name, is copied.

    Raises:
      InputError: there is no such bucket, or a file cannot be read.
    """
    if not is_in_bucket(folder):
        yield folder
        return
    check_reachable(folder)
    with tempfile.TemporaryDirectory(prefix="plt_jax-") as copy:
        for name in files_in(folder):
            if "/" not in name and wanted(name):
                copy_file(folder / name, Path(copy) / name)
        yield Path(copy)


def remove_folder(folder: Path) -> None:
    """Removes a folder, into which threads of a failed writer may still be writing.

    It must stay away for a while: a thread may make the folder again after it was removed. What
    cannot be removed stays.
    """
    absent = 0
    for _ in range(50):
        absent = 0 if folder.exists() else absent + 1
        if absent == 5:
            return
        with contextlib.suppress(OSError):
            remove_tree(folder)
        time.sleep(0.1)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it, or a file.

    Raises:
      OSError: something in it cannot be removed.
    """
    if is_in_bucket(folder):
        cast(Any, folder).rmtree()
    elif folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()
