"""Files: small ones are read within bounds, and all are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import multiprocessing.reduction
import numbers
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from plt_jax.errors import InputError

UNFINISHED = ".unfinished"
"""How the names of files end that a writer has not finished."""
LONGEST_NAME = 256
"""Bytes that the name of a file in a folder has less than."""
MOST_JSON_BYTES = 2**26
"""Bytes of the largest JSON file that is read as a whole; the index of a model of a thousand files
has some millions."""


def expand(path: str | Path) -> Path:
    """Replaces `~` or `~NAME` at the beginning of a path by that user's home folder.

    Raises:
      InputError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # which pathlib raises for an unknown user
        raise InputError(
            f"{path} begins with the home folder of an unknown user; give an existing one"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, which anyone may have made.

    Raises:
      InputError: the file cannot be read, is no regular file of at most MOST_JSON_BYTES, or does
        not hold a JSON mapping.
    """
    try:
        values = json.loads(read_bounded(path, MOST_JSON_BYTES))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping, not a {type(values).__name__}")
    return values


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes.

    Raises:
      InputError: it is larger, or see `check_regular`.
      OSError: it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path} is larger than such a file may be, {most:,} bytes")
    return content


def check_regular(path: Path) -> None:
    """Raises InputError for a pipe or a device, which may have no end, or no beginning."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # opening it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path} is not a regular file")


def file_below(folder: Path, name: str) -> Path:
    """The file of a plain relative name, with slashes, in a folder, which a stranger may have made.

    Raises:
      InputError: the name leads out of the folder, or to what is no regular file, such as a link.
    """
    parts = name.split("/")
    is_plain = name.isprintable() and "\\" not in name and len(name.encode()) < LONGEST_NAME
    if not is_plain or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{name!r} is not the name of a file in {folder}")
    path = folder
    for part in parts:
        path /= part
        if path.is_symlink():
            raise InputError(f"{path} is a link; put the file itself there, as cp -rL does")
    check_regular(path)
    return path


def to_json(values: Any, *, indent: int | None = None) -> str:
    """A JSON text, in which numbers that are not finite are null, since JSON has none.

    Args:
      values: mappings, sequences and numbers; what JSON does not have becomes its string.
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False, default=str)


def _finite(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    if isinstance(values, bool):
        return values
    if isinstance(values, numbers.Integral):
        return int(values)
    if isinstance(values, numbers.Real):
        return float(values) if math.isfinite(values) else None
    return values


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole. If the process is killed, the old or the new file is there.

    Raises:
      InputError: the file cannot be written.
    """
    write_pieces(path, [text])


def write_pieces(path: Path, pieces: Iterable[str]) -> None:
    """Replaces a file as `write_text` does, by the joined pieces of a text.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        with replaced_file(path) as file:
            for piece in pieces:
                file.write(piece.encode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file, which takes the place of `path` if the block ends without an error.

    Readers, and other writers, see the old file or the new one. Until then the new one lies beside
    it, under a name that nobody can foresee: a link that waits there would be followed.

    Raises:
      OSError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def check_new_folder(path: str | Path) -> None:
    """Raises InputError if `path` is a file, a link or a folder that is not empty, or cannot be
    made."""
    path = Path(path).absolute()
    if os.path.islink(path):  # False also for an impossible name
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
    above = next(parent for parent in path.parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise InputError(f"cannot write {path}: {above} is not writable")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new folder, which gets the name `path` if the block ends without an error.

    During the block it has a temporary name beside `path`. After an error it is removed, with the
    parent folders that were made for it.

    Raises:
      InputError: `path` is refused by `check_new_folder`, or cannot be written.
    """
    check_new_folder(path)
    path = Path(path).absolute()
    unfinished = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:8]}")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)  # which replaces an empty folder
    except BaseException as error:
        _remove(unfinished)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise InputError(f"cannot write {path}: {reason}") from error
        raise


class FolderLock:
    """The right to write into a folder, which one process at a time has.

    It ends with the process, however that ends. A process that is spawned with the lock among its
    arguments shares it: then it ends with the last of them. The lock is the folder's own, so that
    no file tells of it. On file systems without locks, everyone has the right.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._descriptor: int | None = None

    def __getstate__(self) -> tuple[Path, Any]:
        descriptor = self._descriptor
        shared = None if descriptor is None else multiprocessing.reduction.DupFd(descriptor)
        return self._folder, shared

    def __setstate__(self, state: tuple[Path, Any]) -> None:
        self._folder, shared = state
        self._descriptor = None if shared is None else shared.detach()

    @property
    def is_held(self) -> bool:
        """Whether this process has taken the lock, or shares it."""
        return self._descriptor is not None

    def take(self) -> bool:
        """Takes the lock of a folder that exists; returns whether nobody else has it.

        Raises:
          OSError: the folder cannot be opened.
        """
        if self.is_held or not self._folder.is_dir():
            return True
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            pass  # this file system has no locks
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Gives the lock back, if it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's contents.

    Raises:
      InputError: the source cannot be read.
      OSError: the target cannot be written.
    """
    try:
        contents = source.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    target.write_bytes(contents)


def _remove(folder: Path) -> None:
    """Removes a folder, into which threads of a failed writer may still be writing.

    It must stay away for a while: a thread may make the folder again after it was removed.
    """
    absent = 0
    for _ in range(50):
        absent = 0 if folder.exists() else absent + 1
        if absent == 5:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
