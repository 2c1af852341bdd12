"""Writing that is never seen half done: a file or folder appears whole, or not at all."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from plt_jax.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that a kill leaves the old one or the new one.

    Raises:
      InputError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def check_new_folder(path: str | Path) -> None:
    """Raises InputError where `path` is a file, or a folder that holds something."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose another destination")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty; choose another destination")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` if the block ends without an error.

    Until then it lies beside `path` under a temporary name; after an error it is gone.

    Raises:
      InputError: `path` is taken (see `check_new_folder`), or cannot be written to.
    """
    check_new_folder(path)
    path = Path(path).absolute()
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            unfinished.rename(path)  # over an empty folder, where there is one
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
