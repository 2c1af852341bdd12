"""Files: small ones are read within bounds, and all are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from plt_jax.errors import InputError

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
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise InputError(f"{path} is not a regular file")  # it might have no end
        if found.st_size > MOST_JSON_BYTES:
            raise InputError(
                f"{path} has {found.st_size:,} bytes; such a file has at most {MOST_JSON_BYTES:,}"
            )
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping, not a {type(values).__name__}")
    return values


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
    if isinstance(values, numbers.Real) and not isinstance(values, numbers.Integral):
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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def check_new_folder(path: str | Path) -> None:
    """Raises InputError if `path` is a file, a link or a folder that is not empty, or cannot be
    made."""
    path = Path(path).absolute()
    if os.path.islink(path):  # False also for an impossible name
        raise InputError(f"{path} is a link; give the folder itself")
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
