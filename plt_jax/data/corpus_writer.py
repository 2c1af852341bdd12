"""Making a prepared corpus: units of text to shards, in parallel, going on where a kill left it.

Beside what `corpus_reader.py` names, its folder holds `parts/`: plan.json, what it is made from,
and a JSON file for each finished unit. A call makes the units whose shards are not there.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
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

from tokenizers import Tokenizer

from plt_jax.config.types import Section
from plt_jax.data.corpus_reader import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Shard,
    Split,
    file_sha256,
)
from plt_jax.data.corpus_reader import check_size as check_shard_size
from plt_jax.data.documents import Piece, find_files, read_piece, split_files
from plt_jax.data.shards import ShardWriter
from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.data.tokens import encode_documents, token_dtype
from plt_jax.errors import InputError
from plt_jax.files import write_text

PARTS, PLAN, LOCK = "parts", "plan.json", ".lock"


class Options(NamedTuple):
    """What, beside its files and tokenizer, decides what a corpus holds."""

    text_field: str = "text"
    """Of JSON lines and Parquet, where a document's text is."""
    validation_fraction: float = 0.005
    """Share of the documents held out, chosen by their text: copies of one go the same way."""
    shard_bytes: int = 64 * 2**20
    """Of text files, as they are on disk, that a shard is made from, about."""
    skip_broken: bool = False
    """Leave out, and count, documents that cannot be read, instead of stopping."""
    vocab_size: int | None = None
    """That the tokenizer was trained to, if it was trained for this corpus."""


class Unit(NamedTuple):
    """What one shard of each split is made from."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes on disk, about."""
        return sum(piece.size for piece in self.pieces)


class Done(Section):
    """What became of a unit."""

    shards: tuple[Shard, ...]
    empty_documents: int
    broken_documents: int


Advance = Callable[[Unit, Done], None]


def prepare(
    inputs: Sequence[str],
    out: Path,
    tokenizer: Tokenizer,
    options: Options,
    workers: int,
    begin: Callable[[int, int], Advance],
) -> Manifest:
    """Makes the corpus `out`, or what is missing of it.

    Args:
      inputs: files and folders, see `documents.find_files`.
      workers: processes; with 1 the work is done in this one.
      begin: is told how many units there are and their bytes, and returns what to call with each
        that is done, finished ones of an earlier call first.

    Raises:
      InputError: something cannot be read or written, `out` is another corpus, or a document is
        broken. What is finished stays, and the same call goes on from it.
    """
    inside = out.absolute()
    files = [path for path in find_files(inputs) if inside not in path.absolute().parents]
    units = group_pieces(split_files(files, options.shard_bytes), options.shard_bytes)
    made_from = _made_from(files, options)
    with _only_one(out), _writable(out):
        _check_same(out, made_from, tokenizer)
        (out / PARTS).mkdir(exist_ok=True)
        _remove_unfinished(out)
        write_text(out / TOKENIZER, tokenizer.to_str())
        write_text(out / PARTS / PLAN, json.dumps(made_from))
        advance = begin(len(units), sum(unit.size for unit in units))
        done: dict[int, Done] = {}
        for unit in units:
            if (found := _find_done(out, unit)) is not None:
                done[unit.index] = found
                advance(unit, found)
        left = [unit for unit in units if unit.index not in done]
        for unit, result in _run(left, out, tokenizer, options, workers):
            done[unit.index] = result
            advance(unit, result)
        return _finish(out, [done[unit.index] for unit in units], made_from, tokenizer)


def group_pieces(pieces: Sequence[Piece], unit_bytes: int) -> list[Unit]:
    """Pieces in units of about `unit_bytes` on disk, in order."""
    units: list[Unit] = []
    gathered: list[Piece] = []
    size = 0
    for number, piece in enumerate(pieces, start=1):
        gathered.append(piece)
        size += piece.size
        if size >= unit_bytes or number == len(pieces):
            units.append(Unit(len(units), tuple(gathered)))
            gathered, size = [], 0
    return units


def make_shards(unit: Unit, out: Path, tokenizer: Tokenizer, options: Options) -> Done:
    """Writes a unit's shards, and then the file that says that it is done."""
    writers: dict[Split, ShardWriter] = {}
    text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    broken, empty = 0, 0

    def report(problem: str) -> None:
        nonlocal broken
        if not options.skip_broken:
            raise InputError(f"{problem}; mend it, or leave such out with --skip_broken")
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
            writers[split] = ShardWriter(out / f".{split}-{unit.index:05}.unfinished")
        writers[split].add(tokens.astype(dtype, copy=False))
    shards = tuple(
        _finish_shard(writers[split], out, unit, split, text_bytes[split])
        for split in SPLITS
        if split in writers
    )
    done = Done(shards=shards, empty_documents=empty, broken_documents=broken)
    write_text(_done_path(out, unit), done.model_dump_json())
    return done


def split_of(contents: bytes, validation_fraction: float) -> Split:
    """Which part a document belongs to, by its text in UTF-8 alone."""
    digest = hashlib.blake2b(contents, digest_size=8).digest()
    drawn = int.from_bytes(digest, "little") / 2**64
    return "validation" if drawn < validation_fraction else "training"


def _encode(
    documents: Iterator[tuple[Split, str]], tokenizer: Tokenizer
) -> Iterator[tuple[Split, Any]]:
    splits: collections.deque[Split] = collections.deque()

    def texts() -> Iterator[str]:
        for split, text in documents:
            splits.append(split)
            yield text

    # Documents come out in the order in which they went in, some later.
    for tokens in encode_documents(texts(), tokenizer):
        yield splits.popleft(), tokens


def _finish_shard(
    writer: ShardWriter, out: Path, unit: Unit, split: Split, text_bytes: int
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


def _run(
    units: Sequence[Unit], out: Path, tokenizer: Tokenizer, options: Options, workers: int
) -> Iterator[tuple[Unit, Done]]:
    """Units as they are done, by several processes if there are."""
    if workers == 1 or len(units) < 2:
        for unit in units:
            yield unit, make_shards(unit, out, tokenizer, options)
        return
    # Forked processes would share what the parent's threads hold locked.
    context = multiprocessing.get_context("spawn")
    arguments = (tokenizer.to_str(), out, options)
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        waiting = {pool.submit(_work, unit): unit for unit in units}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker was killed, perhaps for its memory; run the same command again, with "
                "fewer --workers if need be: finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Worker(NamedTuple):
    tokenizer: Tokenizer
    out: Path
    options: Options


_worker: list[_Worker] = []


def _start_worker(tokenizer: str, out: Path, options: Options) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no stack trace of each at Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes, not threads
    loaded = Tokenizer.from_str(tokenizer)
    loaded.encode_special_tokens = True
    _worker.append(_Worker(loaded, out, options))

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # A parent that is killed cannot stop its workers, and they would wait for it for ever.
    threading.Thread(target=follow, daemon=True).start()


def _work(unit: Unit) -> Done:
    (worker,) = _worker
    with _writable(worker.out):
        return make_shards(unit, worker.out, worker.tokenizer, worker.options)


def _made_from(files: Sequence[Path], options: Options) -> dict[str, Any]:
    listed = []
    for path in files:
        found = path.stat()
        listed.append([str(path), found.st_size, found.st_mtime_ns])
    return {"files": listed, **options._asdict()}


def _check_same(out: Path, made_from: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises InputError where `out` holds something else than this corpus, finished or not."""
    plan = out / PARTS / PLAN
    if not plan.exists():
        unfinished = {LOCK, PARTS, TOKENIZER, f"{TOKENIZER}.tmp"}
        if set(os.listdir(out)) - unfinished:
            raise InputError(f"--out {out} is not empty, and no prepared corpus; choose another")
        return
    earlier = json.loads(plan.read_text(encoding="utf-8"))
    for name, value in made_from.items():
        if earlier.get(name) != value:
            shown = "" if name == "files" else f" ({earlier.get(name)} there, {value} here)"
            raise InputError(
                f"--out {out} is made with other {name}{shown}; give the same to go on with it, "
                "or choose another"
            )
    if load_tokenizer(out / TOKENIZER).to_str() != tokenizer.to_str():
        raise InputError(
            f"--out {out} is made with another tokenizer, {out / TOKENIZER}; give that one to go "
            "on with it, or choose another"
        )


def _find_done(out: Path, unit: Unit) -> Done | None:
    """What a unit became in an earlier call, if all of it is there."""
    path = _done_path(out, unit)
    if not path.exists():
        return None
    try:
        done = Done.model_validate_json(path.read_text(encoding="utf-8"))
        for shard in done.shards:
            check_shard_size(out, shard)
    except ValueError:  # an InputError, or that the file itself is damaged
        return None
    return done


def _done_path(out: Path, unit: Unit) -> Path:
    return out / PARTS / f"{unit.index:05}.json"


def _finish(
    out: Path, done: Sequence[Done], made_from: dict[str, Any], tokenizer: Tokenizer
) -> Manifest:
    manifest = Manifest(
        token_bytes=token_dtype(tokenizer).itemsize,
        tokenizer_sha256=file_sha256(out / TOKENIZER),
        made_from=made_from,
        empty_documents=sum(one.empty_documents for one in done),
        broken_documents=sum(one.broken_documents for one in done),
        shards=tuple(
            shard
            for split in SPLITS
            for one in done
            for shard in one.shards
            if shard.split == split
        ),
    )
    if not manifest.shards:
        raise InputError("the files hold no text; give others")
    write_text(out / MANIFEST, manifest.model_dump_json(indent=1))
    return manifest


def _remove_unfinished(out: Path) -> None:
    for path in out.glob(".*.unfinished"):
        path.unlink()


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keeps other calls out of a folder, which is made if need be."""
    with _writable(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_CREAT | os.O_WRONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--out {out} is being made by another process; wait for it"
            ) from error
        except OSError:
            pass  # some file systems have no locks
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write --out {out} ({error.strerror or error}); finished shards are kept"
        ) from error
