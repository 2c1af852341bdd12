"""Writes a tokenized corpus: units of work become shards, in parallel, and a killed call can go on.

Besides what `tokenized_corpus.py` lists, the folder holds `parts/`: plan.json, which says what the
corpus is made from, and a JSON file for each finished unit. A call writes the units whose shards
are missing.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import NonNegativeInt

from plt_jax.config.types import Section
from plt_jax.data.documents import FilePiece, counted, find_files, read_piece, split_files
from plt_jax.data.shards import ShardWriter
from plt_jax.data.special_tokens import SPECIAL_TOKENS
from plt_jax.data.tokenized_corpus import (
    MANIFEST,
    SPLITS,
    CorpusManifest,
    Shard,
    Split,
    file_sha256,
)
from plt_jax.data.tokenized_corpus import check_size as check_shard_size
from plt_jax.data.tokenizer import TOKENIZER, TextTokenizer, load_tokenizer
from plt_jax.data.tokens import encode_documents, token_dtype
from plt_jax.errors import InputError
from plt_jax.files import UNFINISHED, read_json, write_text
from plt_jax.locks import FolderLock

PARTS, PLAN = "parts", "plan.json"
OLD_LOCK = ".lock"
"""A file that earlier versions left in every corpus."""


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


UnitCallback = Callable[[WorkUnit, UnitResult], None]


def write_corpus(
    inputs: Sequence[str],
    out: Path,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    workers: int,
    start_progress: Callable[[int, int], UnitCallback],
) -> CorpusManifest:
    """Writes the corpus `out`, or what an earlier call has left to write.

    Args:
      inputs: files and folders, see `documents.find_files`.
      out: the corpus's folder, made if need be.
      workers: number of processes; with 1, this process does the work.
      start_progress: is called once with the number of units and their bytes; returns a function to
        call with each finished unit, those of an earlier call first.

    Raises:
      InputError: a file cannot be read or written, `out` holds something else, or a document is
        broken. Finished units are kept, and the same call goes on from them.
    """
    inside = out.absolute()
    files = [path for path in find_files(inputs).files if inside not in path.absolute().parents]
    units = group_pieces(split_files(files, options.shard_bytes), options.shard_bytes)
    made_from = _made_from(files, options)
    with _locked(out) as lock, _writable(out):
        _check_same(out, made_from, tokenizer)
        (out / PARTS).mkdir(exist_ok=True)
        _remove_unfinished(out)
        tokenizer.save(out)
        write_text(out / PARTS / PLAN, json.dumps(made_from))
        report_unit = start_progress(len(units), sum(unit.size for unit in units))
        results: dict[int, UnitResult] = {}
        for unit in units:
            if (result := _find_result(out, unit)) is not None:
                results[unit.index] = result
                report_unit(unit, result)
        left = [unit for unit in units if unit.index not in results]
        for unit, result in _write_units(left, out, lock, tokenizer, options, workers):
            results[unit.index] = result
            report_unit(unit, result)
        return _write_manifest(out, [results[unit.index] for unit in units], made_from, tokenizer)


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
    for split, tokens in _encode(documents(), tokenizer):
        if split not in writers:
            writers[split] = ShardWriter(out / f".{split}-{unit.index:05}{UNFINISHED}")
        writers[split].add(tokens.astype(dtype, copy=False))
    shards = tuple(
        _finish_shard(writers[split], out, unit, split, text_bytes[split])
        for split in SPLITS
        if split in writers
    )
    result = UnitResult(shards=shards, empty_documents=empty, broken_documents=broken)
    write_text(_result_path(out, unit), result.model_dump_json())
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
    writer.path.replace(out / name)
    return shard


def _write_units(
    units: Sequence[WorkUnit],
    out: Path,
    lock: FolderLock,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    workers: int,
) -> Iterator[tuple[WorkUnit, UnitResult]]:
    """Yields each unit when it is finished, in any order."""
    if workers == 1 or len(units) < 2:
        for unit in units:
            yield unit, make_shards(unit, out, tokenizer, options)
        return
    # A forked process would inherit locks that the parent's threads hold, and never get them.
    context = multiprocessing.get_context("spawn")
    arguments = (out, lock, options)
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        waiting = {pool.submit(_work, unit): unit for unit in units}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker was killed, perhaps because memory ran out; run the same command again, "
                "with fewer --workers if memory is short: finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Worker(NamedTuple):
    tokenizer: TextTokenizer
    out: Path
    lock: FolderLock
    """Of `out`: while this process may write there, no other call does, though the parent be
    killed."""
    options: CorpusOptions


_worker: list[_Worker] = []
"""What this worker process was started with; empty in the parent."""


def _start_worker(out: Path, lock: FolderLock, options: CorpusOptions) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C must not print a stack trace per worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all cores
    _worker.append(_Worker(load_tokenizer(out / TOKENIZER), out, lock, options))

    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent that is killed cannot stop its workers, which would wait for work for ever.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(unit: WorkUnit) -> UnitResult:
    (worker,) = _worker
    with _writable(worker.out):
        return make_shards(unit, worker.out, worker.tokenizer, worker.options)


def _made_from(files: Sequence[Path], options: CorpusOptions) -> dict[str, Any]:
    listed = []
    for path in files:
        found = path.stat()
        listed.append([str(path), found.st_size, found.st_mtime_ns])
    return {"files": listed, **options._asdict()}


def _check_same(out: Path, made_from: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Raises InputError where `out` holds anything but this corpus, finished or not."""
    plan = out / PARTS / PLAN
    if not plan.exists():
        names = [name for name in os.listdir(out) if not name.endswith(UNFINISHED)]
        if set(names) - {OLD_LOCK, PARTS, TOKENIZER, SPECIAL_TOKENS}:
            raise InputError(
                f"--out {out} is not empty, and holds no tokenized corpus; choose another folder"
            )
        return
    earlier = read_json(plan)
    for name, value in made_from.items():
        if earlier.get(name) != value:
            shown = "" if name == "files" else f" ({earlier.get(name)} there, {value} here)"
            raise InputError(
                f"--out {out} was made with other {name}{shown}; give the same to go on with it, "
                "or choose another folder"
            )
    if load_tokenizer(out / TOKENIZER).identity != tokenizer.identity:
        raise InputError(
            f"--out {out} was made with another tokenizer, {out / TOKENIZER}; give that one to go "
            "on with it, or choose another folder"
        )


def _find_result(out: Path, unit: WorkUnit) -> UnitResult | None:
    """The result of a unit that an earlier call finished; None if any of its files is missing."""
    path = _result_path(out, unit)
    if not path.exists():
        return None
    try:
        result = UnitResult.model_validate_json(path.read_text(encoding="utf-8"))
        for shard in result.shards:
            check_shard_size(out, shard)
    except ValueError:  # an InputError, or the JSON file itself is damaged
        return None
    return result


def _result_path(out: Path, unit: WorkUnit) -> Path:
    return out / PARTS / f"{unit.index:05}.json"


def _write_manifest(
    out: Path, results: Sequence[UnitResult], made_from: dict[str, Any], tokenizer: TextTokenizer
) -> CorpusManifest:
    manifest = CorpusManifest(
        token_bytes=2 if token_dtype(tokenizer).itemsize == 2 else 4,
        tokenizer_sha256=file_sha256(out / TOKENIZER),
        special_tokens_sha256=file_sha256(out / SPECIAL_TOKENS),
        made_from=made_from,
        empty_documents=sum(result.empty_documents for result in results),
        broken_documents=sum(result.broken_documents for result in results),
        shards=tuple(
            shard
            for split in SPLITS
            for result in results
            for shard in result.shards
            if shard.split == split
        ),
    )
    if not manifest.shards:
        broken = manifest.broken_documents
        why = f" that can be read ({counted(broken, 'broken document')})" if broken else ""
        raise InputError(f"the files hold no text{why}; give files with text")
    write_text(out / MANIFEST, manifest.model_dump_json(indent=1))
    return manifest


def _remove_unfinished(out: Path) -> None:
    for path in out.glob(f".*{UNFINISHED}"):
        path.unlink()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[FolderLock]:
    """Makes the folder if need be, and locks it against other calls; yields the lock."""
    lock = FolderLock(out)
    with _writable(out):
        out.mkdir(parents=True, exist_ok=True)
        if not lock.take():
            raise InputError(f"another process is writing --out {out}; wait until it has ended")
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write --out {out} ({error.strerror or error}); finished shards are kept"
        ) from error
