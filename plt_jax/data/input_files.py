"""Files to read documents from: which there are in folders and buckets, and of which kinds."""

from __future__ import annotations

import collections
import contextlib
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from plt_jax.buckets.address import is_in_bucket
from plt_jax.errors import InputError
from plt_jax.files.paths import (
    FileState,
    check_reachable,
    expand,
    file_state,
    is_folder,
    is_there,
    states_below,
)
from plt_jax.files.reading import check_regular

TEXT, JSON_LINES, PARQUET = (".txt",), (".jsonl", ".ndjson", ".json"), (".parquet",)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class InputFile(NamedTuple):
    """A file to read documents from, on a disk or in a bucket."""

    path: Path
    state: FileState


class FoundFiles(NamedTuple):
    """The files of some inputs."""

    files: list[InputFile]
    """Those of known kinds, in the order of the inputs; those of a folder sorted by path."""
    left_out: list[Path]
    """Those of other kinds in the folders."""


def find_files(inputs: Sequence[str]) -> FoundFiles:
    """Lists the input files, and for each input folder all files below it, linked folders included.

    Args:
      inputs: paths of files and folders, on a disk or in a bucket.

    Raises:
      InputError: an input does not exist, is a file of an unknown kind, or is a folder without a
        file of a known kind; or a name is no text.
    """
    found = FoundFiles([], [])
    for name in inputs:
        path = expand(name)
        check_reachable(path)
        with readable(path):
            if is_folder(path):
                inside = sorted(_files_below(path).items())
                known = [InputFile(entry, state) for entry, state in inside if state is not None]
                left_out = [entry for entry, state in inside if state is None]
                if not known:
                    raise InputError(
                        f"the folder {path} has no files of text{describe_left_out(left_out)}; "
                        f"{_known_kinds()}"
                    )
                found.files.extend(known)
                found.left_out.extend(left_out)
            elif not is_there(path):
                raise InputError(f"there is no file or folder {path}")
            elif is_in_bucket(path) and states_below(path):
                raise InputError(
                    f"{path} is an object, and the beginning of other objects' names; rename one"
                )
            elif kind_of(path):
                found.files.append(InputFile(path, _state_of(path)))
            else:
                raise InputError(f"{path} is of no known kind; {_known_kinds()}")
    for file in found.files:
        try:
            str(file.path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the name {file.path} is not UTF-8, so the corpus cannot list it; rename it"
            ) from error
    return found


def _files_below(folder: Path) -> dict[Path, FileState | None]:
    """All files below a folder: the states of those of known kinds, None for others."""
    if is_in_bucket(folder):
        found = {folder / name: state for name, state in states_below(folder).items()}
        return {path: state if kind_of(path) else None for path, state in found.items()}
    return {path: _state_of(path) if kind_of(path) else None for path in walk(folder)}


def _state_of(path: Path) -> FileState:
    check_regular(path)
    return file_state(path)


def describe_left_out(files: Sequence[Path]) -> str:
    """How many files are of which kinds, as ` (left out: 3 files: .csv 2, .md 1)`; nothing without
    files."""
    if not files:
        return ""
    kinds = collections.Counter(path.suffix.lower() or "without suffix" for path in files)
    listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(8))
    return f" (left out: {counted(len(files), 'file')}: {listed})"


def counted(number: int, noun: str) -> str:
    """A number and its noun, as `1 document` or `2,000 documents`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises InputError with the file's name for what goes wrong with it in the block."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"cannot read {path} ({reason}); repair it, or leave it out") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]  # pyarrow raises subclasses of ValueError
        raise InputError(f"cannot read {path} ({reason}); repair it, or leave it out") from error


def kind_of(path: Path) -> tuple[str, ...] | None:
    """The suffixes of a file's kind; None for one of an unknown kind."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    compressed = last in COMPRESSED
    kinds = (TEXT, JSON_LINES) if compressed else (TEXT, JSON_LINES, PARQUET)
    return next((kind for kind in kinds if (before if compressed else last) in kind), None)


def is_collection(path: Path) -> bool:
    """Whether a file's name says that it holds documents in a form that is no text by itself."""
    return path.suffix.lower() in (*JSON_LINES, *PARQUET, *COMPRESSED)


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, linked folders included.

    Raises:
      InputError: a folder cannot be read, or a link leads to a folder around it.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot read {error.filename} ({error.strerror}); make it readable, or leave it out"
        ) from error

    # os.walk reports folders that it may not read; Path.rglob would leave them out silently.
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in folders:
            inside = Path(parent, name)
            if inside.is_symlink() and Path(parent).resolve().is_relative_to(inside.resolve()):
                raise InputError(f"the link {inside} leads to a folder around it; remove it")
        yield from (Path(parent, name) for name in names)


def _known_kinds() -> str:
    return (
        "give .txt, .jsonl (.ndjson, .json) or .parquet; the first two also as "
        f"{', '.join(COMPRESSED)}"
    )
