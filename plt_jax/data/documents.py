"""Documents in files of text, JSON lines and Parquet, split into pieces to read in parallel."""

from __future__ import annotations

import bz2
import collections
import contextlib
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.buckets.address import is_in_bucket
from plt_jax.errors import InputError
from plt_jax.files import (
    FileState,
    check_reachable,
    check_regular,
    expand,
    file_state,
    is_folder,
    is_there,
    states_below,
    to_path,
)

TEXT, JSON_LINES, PARQUET = (".txt",), (".jsonl", ".ndjson", ".json"), (".parquet",)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MOST_LINE_BYTES = 2**26
"""Bytes of the longest line of JSON that is read."""
MOST_TEXT_BYTES = 2**28
"""Bytes of the longest text file that is read, once it is decompressed: a compressed file does not
show how large it is. A file that is not compressed may have any size."""

ProblemCallback = Callable[[str], None]
"""Is called with one line about a document that cannot be read. It may raise to stop the reading;
otherwise the document is left out."""


class FilePiece(NamedTuple):
    """A part of a file that can be read without the others."""

    path: str
    begin: int
    """First byte (JSON lines) or row group (Parquet) of the piece."""
    end: int | None
    """First byte or row group after the piece; None where the piece is a whole file."""
    size: int
    """Bytes on disk, about."""


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
        with _readable(path):
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
            elif _kind(path):
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
        return {path: state if _kind(path) else None for path, state in found.items()}
    return {path: _state_of(path) if _kind(path) else None for path in walk(folder)}


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


def split_files(files: Sequence[InputFile], piece_bytes: int) -> list[FilePiece]:
    """Splits JSON lines and Parquet files into pieces of about `piece_bytes`; keeps others whole.

    Returns:
      The pieces, in the order of the files.

    Raises:
      InputError: a file cannot be read.
    """
    pieces: list[FilePiece] = []
    for path, (size, _) in files:
        with _readable(path):
            kind = _kind(path)
            if kind == PARQUET:
                pieces += _row_groups(path, piece_bytes)
            elif kind == JSON_LINES and path.suffix.lower() not in COMPRESSED:
                ends = [*range(piece_bytes, size, piece_bytes), size]
                pieces += [
                    FilePiece(str(path), begin, end, end - begin)
                    for begin, end in zip([0, *ends], ends, strict=False)
                ]
            else:
                pieces.append(FilePiece(str(path), 0, None, size))
    return pieces


def read_piece(piece: FilePiece, text_field: str, report: ProblemCallback) -> Iterator[str]:
    """Yields the documents that begin in a piece: a whole text file, or one for each line or row.

    Args:
      text_field: name of the JSON field or Parquet column that holds a document's text.
      report: is called for each line that is not JSON or has no text, and for text that is not
        UTF-8.

    Raises:
      InputError: the file cannot be read, is damaged, or has no such column.
    """
    path = to_path(piece.path)
    kind = _kind(path)
    with _readable(path):
        if kind == PARQUET:
            yield from _rows(piece, text_field, report)
        elif kind == JSON_LINES:
            yield from _lines(piece, text_field, report)
        else:
            with _open(path) as file:
                compressed = path.suffix.lower() in COMPRESSED
                contents = file.read(MOST_TEXT_BYTES + 1 if compressed else -1)
            if compressed and len(contents) > MOST_TEXT_BYTES:
                report(f"{path} holds more than {MOST_TEXT_BYTES:,} bytes; split it into documents")
                return
            try:
                yield contents.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                report(f"{path} is not UTF-8 text: byte {error.start} does not decode")


def _lines(piece: FilePiece, text_field: str, report: ProblemCallback) -> Iterator[str]:
    with _open(to_path(piece.path)) as file:
        place = piece.begin
        if piece.begin:
            # A line that began before this piece belongs to the piece before.
            file.seek(piece.begin - 1)
            place += _skip_line(file) - 1
        while (piece.end is None or place < piece.end) and (line := _read_line(file)):
            where = f"{piece.path}, the line at byte {place},"
            place += len(line)
            if len(line) > MOST_LINE_BYTES:
                place += 0 if line.endswith(b"\n") else _skip_line(file)
                report(f"{where} has more than {MOST_LINE_BYTES:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                text = _text_of(json.loads(line), text_field)
                text.encode("utf-8")  # JSON can hold half of a surrogate pair, which is no text
            except (ValueError, RecursionError) as error:
                report(f"{where} {_problem(error, line)}")
            else:
                yield text


def _read_line(file: io.BufferedIOBase) -> bytes:
    """A line with its newline; of a longer one than MOST_LINE_BYTES its beginning."""
    return file.readline(MOST_LINE_BYTES + 1)


def _skip_line(file: io.BufferedIOBase) -> int:
    """Reads on behind the next newline; returns the number of bytes."""
    skipped = 0
    while line := _read_line(file):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _text_of(value: Any, text_field: str) -> str:
    if not isinstance(value, dict):
        raise InputError("is not a JSON object")
    found: Any = value
    for name in [text_field] if text_field in value else text_field.split("."):
        if found is None:
            break
        if not isinstance(found, dict) or name not in found:
            names = ", ".join(list(value)[:8])
            raise InputError(
                f"has no text in {text_field!r}; it has {names or 'no fields'} (a field within "
                "another is named with a dot, as meta.text)"
            )
        found = found[name]
    if found is None:
        return ""  # a null is an empty document
    if not isinstance(found, str):
        kind = {dict: "an object", list: "a list", bool: "true or false"}.get(
            type(found), "a number"
        )
        raise InputError(f"has no text in {text_field!r}, but {kind}")
    return found


def _problem(error: Exception, line: bytes) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if line.lstrip()[:1] == b"[" or (
        line.strip() == b"{" and isinstance(error, json.JSONDecodeError)
    ):
        return (
            "is not JSON of one object a line, but begins an array or an object of several lines; "
            "rewrite the file, for example with jq -c '.[]'"
        )
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, UnicodeError):
        return "is not UTF-8"
    return f"is not JSON ({getattr(error, 'msg', error)})"


def _row_groups(path: Path, piece_bytes: int) -> list[FilePiece]:
    metadata = _parquet_file(path).metadata
    pieces, begin, size = [], 0, 0
    for index in range(metadata.num_row_groups):
        size += metadata.row_group(index).total_byte_size
        if size >= piece_bytes or index + 1 == metadata.num_row_groups:
            pieces.append(FilePiece(str(path), begin, index + 1, size))
            begin, size = index + 1, 0
    return pieces


def _rows(piece: FilePiece, text_field: str, report: ProblemCallback) -> Iterator[str]:
    arrow, file = _arrow(), _parquet_file(to_path(piece.path))
    schema = file.schema_arrow
    path = [text_field] if text_field in schema.names else text_field.split(".")
    kind = arrow.struct(list(schema))
    for name in path:
        if not arrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            names = ", ".join(schema.names[:8])
            raise InputError(
                f"{piece.path} has no column {text_field!r}; it has {names} (a field of a struct "
                "is named with a dot, as meta.text)"
            )
        kind = kind.field(name).type
    assert piece.end is not None
    groups, row = list(range(piece.begin, piece.end)), 0
    for batch in file.iter_batches(row_groups=groups, columns=[".".join(path)]):
        column = batch.column(0)
        for name in path[1:]:
            column = arrow.compute.struct_field(column, name)
        for value in column:
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                report(f"{piece.path}, row {row} of row groups {piece.begin} on, is not UTF-8")
                continue
            if not isinstance(text, str | None):
                raise InputError(
                    f"{piece.path}: the column {text_field!r} holds no text, but {kind}; give the "
                    "name of a column of text (--text_field)"
                )
            yield text or ""  # a null is an empty document


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if suffix == ".zst":
            yield io.BufferedReader(_arrow().CompressedInputStream(file, "zstd"))
            return
        module = {".gz": gzip, ".bz2": bz2, ".xz": lzma}.get(suffix)
        yield module.open(file, "rb") if module else file


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
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


def _kind(path: Path) -> tuple[str, ...] | None:
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


def _arrow():
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(
            "Parquet and .zst files need pyarrow: pip install 'plt_jax[prepare]'"
        ) from error
    return pyarrow


def _parquet_file(path: Path):
    _arrow()
    from pyarrow import parquet

    return parquet.ParquetFile(path.open("rb") if is_in_bucket(path) else path)
