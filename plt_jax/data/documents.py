"""Documents in files of text, JSON lines and Parquet, split into pieces to read in parallel."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.buckets.address import is_in_bucket
from plt_jax.data.input_files import COMPRESSED, JSON_LINES, PARQUET, InputFile, kind_of, readable
from plt_jax.errors import InputError
from plt_jax.files.paths import to_path

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


def split_files(files: Sequence[InputFile], piece_bytes: int) -> list[FilePiece]:
    """Splits JSON lines and Parquet files into pieces of about `piece_bytes`; keeps others whole.

    Returns:
      The pieces, in the order of the files.

    Raises:
      InputError: a file cannot be read.
    """
    pieces: list[FilePiece] = []
    for path, (size, _) in files:
        with readable(path):
            kind = kind_of(path)
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
    kind = kind_of(path)
    with readable(path):
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
