"""Small files are read within bounds, and names of files that strangers give lead nowhere else."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, cast

from plt_jax.buckets.address import is_in_bucket
from plt_jax.errors import InputError

LONGEST_NAME = 256
"""Bytes that the name of a file in a folder has less than."""
MOST_JSON_BYTES = 2**26
"""Bytes of the largest JSON file that is read as a whole; the index of a model of a thousand files
has some millions."""


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
