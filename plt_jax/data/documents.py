"""Documents in files of text, JSON lines and Parquet, split into pieces to read in parallel."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.errors import InputError
from plt_jax.files import expand

TEXT, JSON_LINES, PARQUET = (".txt",), (".jsonl", ".ndjson", ".json"), (".parquet",)
COMPRESSED = (".gz", ".zst")

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


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Lists the input files, and for each input folder all files of known kinds below it.

    Args:
      inputs: paths of files and folders.

    Returns:
      The files in the order of the inputs, those of a folder sorted by path.

    Raises:
      InputError: an input does not exist, is a file of an unknown kind, or is a folder without a
        file of a known kind.
    """
    found: list[Path] = []
    for name in inputs:
        path = expand(name)
        if not os.path.exists(path):
            raise InputError(f"there is no file or folder {path}")
        if path.is_dir():
            inside = sorted(entry for entry in _walk(path) if _kind(entry))
            if not inside:
                raise InputError(f"the folder {path} has no files of text; {_known_kinds()}")
            found += inside
        elif _kind(path):
            found.append(path)
        else:
            raise InputError(f"{path} is of no known kind; {_known_kinds()}")
    return found


def split_files(files: Sequence[Path], piece_bytes: int) -> list[FilePiece]:
    """Splits JSON lines and Parquet files into pieces of about `piece_bytes`; keeps others whole.

    Returns:
      The pieces, in the order of the files.

    Raises:
      InputError: a file cannot be read.
    """
    pieces: list[FilePiece] = []
    for path in files:
        with _readable(path):
            size = path.stat().st_size
            kind = _kind(path)
            if kind == PARQUET:
                pieces += _row_groups(path, piece_bytes)
            elif kind == JSON_LINES and path.suffix not in COMPRESSED:
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
    path = Path(piece.path)
    kind = _kind(path)
    with _readable(path):
        if kind == PARQUET:
            yield from _rows(piece, text_field)
        elif kind == JSON_LINES:
            yield from _lines(piece, text_field, report)
        else:
            with _open(path) as file:
                contents = file.read()
            try:
                yield contents.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                report(f"{path} is not UTF-8 text: byte {error.start} does not decode")


def _lines(piece: FilePiece, text_field: str, report: ProblemCallback) -> Iterator[str]:
    with _open(Path(piece.path)) as file:
        place = piece.begin
        if piece.begin:
            # A line that began before this piece belongs to the piece before.
            file.seek(piece.begin - 1)
            place += len(file.readline()) - 1
        while (piece.end is None or place < piece.end) and (line := file.readline()):
            where = f"{piece.path}, the line at byte {place},"
            place += len(line)
            if not line.strip():
                continue
            try:
                text = _text_of(json.loads(line), text_field)
                text.encode("utf-8")  # JSON can hold half of a surrogate pair, which is no text
            except ValueError as error:
                report(f"{where} {_problem(error)}")
            else:
                yield text


def _text_of(value: Any, text_field: str) -> str:
    if not isinstance(value, dict):
        raise InputError("is not a JSON object")
    text = value.get(text_field)
    if not isinstance(text, str):
        names = ", ".join(list(value)[:8])
        raise InputError(f"has no text in {text_field!r}; it has {names or 'no fields'}")
    return text


def _problem(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg})"
    return "is not UTF-8" if isinstance(error, UnicodeError) else str(error)


def _row_groups(path: Path, piece_bytes: int) -> list[FilePiece]:
    metadata = _parquet().ParquetFile(path).metadata
    pieces, begin, size = [], 0, 0
    for index in range(metadata.num_row_groups):
        size += metadata.row_group(index).total_byte_size
        if size >= piece_bytes or index + 1 == metadata.num_row_groups:
            pieces.append(FilePiece(str(path), begin, index + 1, size))
            begin, size = index + 1, 0
    return pieces


def _rows(piece: FilePiece, text_field: str) -> Iterator[str]:
    file = _parquet().ParquetFile(piece.path)
    if text_field not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names[:8])
        raise InputError(f"{piece.path} has no column {text_field!r}; it has {names}")
    assert piece.end is not None
    groups = list(range(piece.begin, piece.end))
    for batch in file.iter_batches(row_groups=groups, columns=[text_field]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str | None):
                raise InputError(f"{piece.path}: the column {text_field!r} holds no text")
            yield text or ""  # a null is an empty document


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        arrow = _arrow()
        return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd"))
    return open(path, "rb")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"cannot read {path} ({reason}); repair it, or leave it out") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]  # pyarrow raises subclasses of ValueError
        raise InputError(f"cannot read {path} ({reason}); repair it, or leave it out") from error


def _kind(path: Path) -> tuple[str, ...] | None:
    suffixes = path.suffixes[-2:] if path.suffix in COMPRESSED else path.suffixes[-1:]
    kinds = (TEXT, JSON_LINES) if path.suffix in COMPRESSED else (TEXT, JSON_LINES, PARQUET)
    return next((kind for kind in kinds if suffixes and suffixes[0] in kind), None)


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename} ({error.strerror})") from error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)


def _known_kinds() -> str:
    return "give .txt, .jsonl (.ndjson, .json) or .parquet; the first two also as .gz or .zst"


def _arrow():
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(
            "Parquet and .zst files need pyarrow: pip install 'plt_jax[prepare]'"
        ) from error
    return pyarrow


def _parquet():
    _arrow()
    from pyarrow import parquet

    return parquet
