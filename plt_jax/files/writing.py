"""Files are written whole or not at all, on a disk or in a bucket."""

from __future__ import annotations

import contextlib
import io
import json
import math
import numbers
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from plt_jax.buckets.address import is_in_bucket
from plt_jax.errors import InputError

UNFINISHED = ".unfinished"
"""How the names of files end that a writer has not finished."""


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
