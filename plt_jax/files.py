"""Files: small ones are read within bounds, and all are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import numbers
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from plt_jax.buckets.address import is_in_bucket, refuse_other_schemes
from plt_jax.errors import InputError

UNFINISHED = ".unfinished"
"""How the names of files end that a writer has not finished."""
LONGEST_NAME = 256
"""Bytes that the name of a file in a folder has less than."""
MOST_JSON_BYTES = 2**26
"""Bytes of the largest JSON file that is read as a whole; the index of a model of a thousand files
has some millions."""


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


def read_range(path: Path, first: int, end: int) -> bytes:
    """The bytes of an object in a bucket from position `first` to before `end`.

    Raises:
      OSError: it cannot be read.
    """
    return cast(Any, path).read_range(first, end)


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
    if is_in_bucket(folder):
        return folder / name  # an object is neither a link nor a device
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


def write_synced(path: Path, text: str) -> None:
    """Writes a new file, and waits until it is on the disk.

    Raises:
      OSError: it cannot be written.
    """
    if is_in_bucket(path):
        path.write_text(text)
        return
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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


def write_new(path: Path, text: str) -> bool:
    """Writes a file that does not exist yet; returns False, and writes nothing, if it does.

    Of several processes that do so at once, on one machine or many, one succeeds. (On a file system
    without links several may, and the last one's file stays.)

    Raises:
      InputError: the file cannot be written.
    """
    try:
        if is_in_bucket(path):
            from plt_jax.buckets.service import write_generation

            return write_generation(path, text, before=0) is not None
        unfinished = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}{UNFINISHED}")
        try:
            write_synced(unfinished, text)
            os.link(unfinished, path)  # which, unlike renaming, replaces nothing
        except FileExistsError:
            return False
        except OSError:
            if path.exists():
                return False
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return True
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file, which takes the place of `path` if the block ends without an error.

    Readers, and other writers, see the old file or the new one. Until then the new one lies beside
    it, under a name that nobody can foresee: a link that waits there would be followed. An object
    in a bucket is written as a whole anyway.

    Raises:
      OSError: the file cannot be written.
    """
    if is_in_bucket(path):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
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


def files_in(folder: Path) -> list[str]:
    """The files in a folder and its subfolders: their paths in it, with slashes, in order."""
    paths = (path for path in folder.rglob("*") if is_in_bucket(path) or path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)
