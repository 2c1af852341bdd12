"""Units of work of a tokenized corpus: pieces of files become shards, and a note of their sizes."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import NonNegativeInt

from plt_jax.buckets.address import is_in_bucket
from plt_jax.config.types import Section
from plt_jax.data.documents import FilePiece, read_piece
from plt_jax.data.shards import SPLITS, Shard, ShardWriter, Split
from plt_jax.data.tokenized_corpus import file_sha256
from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.data.tokens import encode_documents, token_dtype
from plt_jax.errors import InputError
from plt_jax.files.folders import copy_file
from plt_jax.files.writing import UNFINISHED, write_text

PARTS = "parts"
"""The folder of a corpus in which units are marked as finished."""


class CorpusOptions(NamedTuple):
    """Options that decide, together with the files and the tokenizer, what a corpus holds."""

    text_field: str = "text"
    """Name of the field (JSON lines) or column (Parquet) that holds a document's text."""
    validation_fraction: float = 0.005
    """Share of the documents held out. A document's text alone decides, so copies of a document are
    in the same split."""
    shard_bytes: int = 64 * 2**20
    """Bytes of input files, as they are on disk, that become one shard, about."""
    skip_broken: bool = False
    """Whether to count and leave out documents that cannot be read, instead of stopping."""
    vocab_size: int | None = None
    """Size that a tokenizer was trained to, if one was trained for this corpus."""


class WorkUnit(NamedTuple):
    """Pieces of files that become one shard of each split."""

    index: int
    pieces: tuple[FilePiece, ...]

    @property
    def size(self) -> int:
        """Bytes on disk, about."""
        return sum(piece.size for piece in self.pieces)


class UnitResult(Section):
    """The shards of a finished unit, and the numbers of documents left out; kept as JSON."""

    shards: tuple[Shard, ...]
    empty_documents: NonNegativeInt
    broken_documents: NonNegativeInt


def result_path(out: Path, unit: WorkUnit) -> Path:
    return out / PARTS / f"{unit.index:05}.json"


def group_pieces(pieces: Sequence[FilePiece], unit_bytes: int) -> list[WorkUnit]:
    """Groups pieces into units of about `unit_bytes` on disk, in order."""
    units: list[WorkUnit] = []
    gathered: list[FilePiece] = []
    size = 0
    for number, piece in enumerate(pieces, start=1):
        gathered.append(piece)
        size += piece.size
        if size >= unit_bytes or number == len(pieces):
            units.append(WorkUnit(len(units), tuple(gathered)))
            gathered, size = [], 0
    return units


def make_shards(
    unit: WorkUnit, out: Path, tokenizer: TextTokenizer, options: CorpusOptions
) -> UnitResult:
    """Writes a unit's shards, and after them the JSON file that marks the unit as finished."""
    writers: dict[Split, ShardWriter] = {}
    text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    broken, empty = 0, 0

    def report(problem: str) -> None:
        nonlocal broken
        if not options.skip_broken:
            raise InputError(
                f"{problem}; correct it, or leave out broken documents with --skip_broken"
            )
        broken += 1

    def documents() -> Iterator[tuple[Split, str]]:
        nonlocal empty
        for piece in unit.pieces:
            for text in read_piece(piece, options.text_field, report):
                if not text.strip():
                    empty += 1
                    continue
                contents = text.encode("utf-8")
                split = split_of(contents, options.validation_fraction)
                text_bytes[split] += len(contents)
                yield split, text

    dtype = token_dtype(tokenizer)
    with _unfinished_folder(out) as folder:
        for split, tokens in _encode(documents(), tokenizer):
            if split not in writers:
                writers[split] = ShardWriter(folder / unfinished_name(split, unit))
            writers[split].add(tokens.astype(dtype, copy=False))
        shards = tuple(
            _finish_shard(writers[split], out, unit, split, text_bytes[split])
            for split in SPLITS
            if split in writers
        )
    result = UnitResult(shards=shards, empty_documents=empty, broken_documents=broken)
    write_text(result_path(out, unit), result.model_dump_json())
    return result


def split_of(contents: bytes, validation_fraction: float) -> Split:
    """The split that a document belongs to, which its text in UTF-8 alone decides."""
    digest = hashlib.blake2b(contents, digest_size=8).digest()
    drawn = int.from_bytes(digest, "little") / 2**64
    return "validation" if drawn < validation_fraction else "training"


def _encode(
    documents: Iterator[tuple[Split, str]], tokenizer: TextTokenizer
) -> Iterator[tuple[Split, Any]]:
    splits: collections.deque[Split] = collections.deque()

    def texts() -> Iterator[str]:
        for split, text in documents:
            splits.append(split)
            yield text

    # The encoder reads ahead, but returns documents in the order in which it read them.
    for tokens in encode_documents(texts(), tokenizer):
        yield splits.popleft(), tokens


def _finish_shard(
    writer: ShardWriter, out: Path, unit: WorkUnit, split: Split, text_bytes: int
) -> Shard:
    writer.close()
    name = f"{split}-{unit.index:05}.array_record"
    shard = Shard(
        name=name,
        split=split,
        tokens=writer.tokens,
        documents=writer.documents,
        text_bytes=text_bytes,
        size=writer.path.stat().st_size,
        sha256=file_sha256(writer.path),
    )
    if is_in_bucket(out):
        copy_file(writer.path, out / name)
    else:
        writer.path.replace(out / name)
    return shard


@contextlib.contextmanager
def _unfinished_folder(out: Path) -> Iterator[Path]:
    """Where shards are written before they have their names: in `out`, or for a corpus in a bucket
    in a temporary folder."""
    if not is_in_bucket(out):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="plt_jax-") as folder:
        yield Path(folder)


def unfinished_name(split: Split, unit: WorkUnit) -> str:
    return f".{split}-{unit.index:05}{UNFINISHED}"
