"""Files in the cache folder: named by what they were made from, and never half written."""

import hashlib
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from plt_jax.errors import InputError, naming
from plt_jax.files import expand

_FORMAT = "1"
"""Raise when the way tokenizers or tokens are made changes, so that old files are not reused."""


def fingerprint(parts: Iterable[str]) -> str:
    """A name for a sequence of strings: the same for the same parts in the same order only."""
    digest = hashlib.sha256(_FORMAT.encode())
    for part in parts:
        data = part.encode("utf-8")
        # The length keeps ["ab", "c"] and ["a", "bc"] apart.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def cache_folder(cache_dir: str) -> Path:
    """The folder `cache_dir`, made if need be; `~` is the home folder.

    Raises:
      InputError: it cannot be made.
    """
    with naming("data.cache_dir"):
        folder = expand(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that readers, and other writers of it, only ever see a whole one.

    Args:
      path: the file; its folder exists.
      write: called with the open binary file.

    Raises:
      InputError: the folder cannot be written to.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            with open(unfinished, "xb") as file:
                write(file)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write to the cache folder {folder} ({error.strerror}); "
        "set data.cache_dir to a folder that can be written to"
    )
