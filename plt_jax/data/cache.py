"""Cache files: each is named by the contents that it was made from, and is never half written."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from plt_jax.errors import InputError, naming
from plt_jax.files.paths import expand
from plt_jax.files.writing import replaced_file

_FORMAT = "1"
"""Version of how tokenizers and tokens are made; raise it to stop old files from being reused."""


def fingerprint(parts: Iterable[str]) -> str:
    """A name for a sequence of strings, equal only for the same strings in the same order."""
    digest = hashlib.sha256(_FORMAT.encode())
    for part in parts:
        data = part.encode("utf-8")
        # The length keeps ["ab", "c"] and ["a", "bc"] apart.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def cache_folder(cache_dir: str) -> Path:
    """Makes the folder `cache_dir` if need be and returns its path, with `~` expanded.

    Raises:
      InputError: the folder cannot be made.
    """
    with naming("data.cache_dir"):
        folder = expand(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that readers and other writers see either nothing or the whole file.

    Args:
      path: the file, in a folder that exists.
      write: is called with the open binary file.

    Raises:
      InputError: the folder cannot be written to.
    """
    try:
        with replaced_file(path) as file:
            write(file)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write to the cache folder {folder} ({error.strerror}); "
        "set data.cache_dir to a folder that can be written to"
    )
