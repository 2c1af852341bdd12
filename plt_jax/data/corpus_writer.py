"""Writes a tokenized corpus: units of work become shards, in parallel, and a killed call can go on.

Besides what `tokenized_corpus.py` lists, the folder holds `parts/`: plan.json, which says what the
corpus is made from, and a JSON file for each finished unit. A call writes the units whose shards
are missing. Several machines may each write a part of the units; the call that finds all units
finished writes the manifest.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.buckets.address import is_in_bucket
from plt_jax.data.cache import fingerprint
from plt_jax.data.corpus_units import (
    PARTS,
    CorpusOptions,
    UnitResult,
    WorkUnit,
    group_pieces,
    make_shards,
    result_path,
    unfinished_name,
)
from plt_jax.data.documents import split_files
from plt_jax.data.input_files import InputFile, counted, find_files
from plt_jax.data.shards import SPLITS
from plt_jax.data.special_tokens import SPECIAL_TOKENS
from plt_jax.data.tokenized_corpus import MANIFEST, CorpusManifest, file_sha256
from plt_jax.data.tokenizer import TOKENIZER, TextTokenizer, load_tokenizer
from plt_jax.data.tokens import token_dtype
from plt_jax.errors import InputError
from plt_jax.files.paths import check_reachable, is_folder, states_below, to_path
from plt_jax.files.reading import file_below, read_json
from plt_jax.files.writing import UNFINISHED, write_new, write_text
from plt_jax.locks import LOCK_FILE, FolderLock, Lock, lock_of

PLAN = "plan.json"
READS = 16
"""Small files that are read at once."""


class Part(NamedTuple):
    """The share of the units that a call writes; others may write the others at the same time."""

    number: int = 1
    """Number of the part, from 1."""
    of: int = 1
    """Number of parts."""

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


UnitCallback = Callable[[WorkUnit, UnitResult], None]


def write_corpus(
    inputs: Sequence[str],
    out: Path,
    tokenizer: TextTokenizer,
    options: CorpusOptions,
    workers: int,
    start_progress: Callable[[int, int], UnitCallback],
    part: Part = Part(),
) -> CorpusManifest | int:
    """Writes the corpus `out`, or a part of it, or what an earlier call has left to write.

    Args:
      inputs: files and folders, see `documents.find_files`; files within `out` are left out.
      out: the corpus's folder, made if need be, or its path in a bucket.
      workers: number of processes; with 1, this process does the work.
      start_progress: is called once with the number of units and their bytes; returns a function to
        call with each finished unit, those of an earlier call first.
      part: the units that this call writes.

    Returns:
      The manifest, or the number of units that other parts have not written yet.

    Raises:
      InputError: a file cannot be read or written, `out` holds something else, or a document is
        broken. Finished units are kept, and the same call goes on from them.
      FailedError: another process has taken over a corpus in a bucket.
    """
    files = [
        file
        for file in find_files(inputs).files
        if not file.path.absolute().is_relative_to(out.absolute())
    ]
    units = group_pieces(split_files(files, options.shard_bytes), options.shard_bytes)
    own = units[part.number - 1 :: part.of]
    made_from = _made_from(files, options)
    plan = {**made_from, "parts": part.of, "tokenizer": fingerprint([tokenizer.identity])}
    check_reachable(out)
    _check_same(out, plan, tokenizer)
    with _locked(out, part) as lock, _writable(out):
        _claim(out, plan, tokenizer)
        _remove_unfinished(out, own, part)
        report_unit = start_progress(len(own), sum(unit.size for unit in own))
        results = _find_results(out, own)
        for unit in own:
            if unit.index in results:
                report_unit(unit, results[unit.index])
        left = [unit for unit in own if unit.index not in results]
        for unit, result in _write_units(left, out, lock, tokenizer, options, workers):
            results[unit.index] = result
            report_unit(unit, result)
        results |= _find_results(out, [unit for unit in units if unit.index not in results])
        if len(results) < len(units):
            return len(units) - len(results)
        lock.renew()
        return _write_manifest(out, [results[unit.index] for unit in units], made_from, tokenizer)


def has_tokenizer(out: Path) -> bool:
    """Whether a call has begun to write the corpus `out`, and its tokenizer is there."""
    return _is_begun(out) and (out / TOKENIZER).exists() and (out / SPECIAL_TOKENS).exists()


def _is_begun(out: Path) -> bool:
    return (out / PARTS / PLAN).exists()


def _write_units(
    units: Sequence[WorkUnit],
    out: Path,
    lock: Lock,
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
    arguments = (str(out), lock if isinstance(lock, FolderLock) else None, options)
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
    lock: FolderLock | None
    """Of a folder on a disk: while this process may write there, no other call does, though the
    parent be killed. A lock in a bucket outlives its process long enough."""
    options: CorpusOptions


_worker: list[_Worker] = []
"""What this worker process was started with; empty in the parent."""


def _start_worker(folder: str, lock: FolderLock | None, options: CorpusOptions) -> None:
    out = to_path(folder)
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


def _made_from(files: Sequence[InputFile], options: CorpusOptions) -> dict[str, Any]:
    return {"files": [[str(path), *state] for path, state in files], **options._asdict()}


def _claim(out: Path, plan: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Makes `out` a folder of this corpus, unless it is one already.

    Of calls that begin at the same time with different plans or tokenizers, one goes on.

    Raises:
      InputError: it is a folder of another corpus.
    """
    if not _is_begun(out):
        (out / PARTS).mkdir(exist_ok=True)
        write_new(out / PARTS / PLAN, json.dumps(plan))
    _check_same(out, plan, tokenizer)
    if not has_tokenizer(out):
        tokenizer.save(out)  # the same one, whoever does it


def _check_same(out: Path, plan: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Raises InputError where `out` holds anything but this corpus, finished or not."""
    if not _is_begun(out):
        names = [path.name for path in out.iterdir()] if is_folder(out) else []
        names = [name for name in names if not name.endswith(UNFINISHED)]
        if set(names) - {LOCK_FILE, PARTS, TOKENIZER, SPECIAL_TOKENS}:
            raise InputError(
                f"--out {out} is not empty, and holds no tokenized corpus; choose another folder"
            )
        return
    # Earlier versions knew neither parts nor the tokenizer's fingerprint.
    known = {"parts": 1, "tokenizer": plan["tokenizer"]} | read_json(out / PARTS / PLAN)
    other_tokenizer = known.pop("tokenizer") != plan["tokenizer"]
    for name, value in plan.items():
        if name != "tokenizer" and known.get(name) != value:
            shown = "" if name == "files" else f" ({known.get(name)} there, {value} here)"
            raise InputError(
                f"--out {out} was made with other {name}{shown}; give the same to go on with it, "
                "or choose another folder"
            )
    if not other_tokenizer and has_tokenizer(out):
        other_tokenizer = load_tokenizer(out / TOKENIZER).identity != tokenizer.identity
    if other_tokenizer:
        raise InputError(
            f"--out {out} was made with another tokenizer, {out / TOKENIZER}; give that one to go "
            "on with it, or choose another folder"
        )


def _find_results(out: Path, units: Sequence[WorkUnit]) -> dict[int, UnitResult]:
    """The results of the units that are finished, and all of whose files are there."""
    there = states_below(out) if units else {}

    def find(unit: WorkUnit) -> UnitResult | None:
        path = result_path(out, unit)
        if path.relative_to(out).as_posix() not in there:
            return None
        try:
            result = UnitResult.model_validate_json(path.read_text(encoding="utf-8"))
            for shard in result.shards:
                file_below(out, shard.name)
        except ValueError:  # the JSON file is damaged, or a shard is a link
            return None
        sizes = [there[shard.name].size for shard in result.shards if shard.name in there]
        return result if sizes == [shard.size for shard in result.shards] else None

    with ThreadPoolExecutor(READS) as threads:  # each waits for a bucket, if they are in one
        found = threads.map(find, units)
        return {
            unit.index: result
            for unit, result in zip(units, found, strict=True)
            if result is not None
        }


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


def _remove_unfinished(out: Path, units: Sequence[WorkUnit], part: Part) -> None:
    """Removes what an earlier call has left of these units' files."""
    if is_in_bucket(out):
        return
    own = {unfinished_name(split, unit) for split in SPLITS for unit in units}
    for path in out.glob(f".*{UNFINISHED}"):
        if part.of == 1 or path.name in own:
            path.unlink()


@contextlib.contextmanager
def _locked(out: Path, part: Part) -> Iterator[Lock]:
    """Makes the folder if need be, and keeps other calls from writing the part; yields the lock."""
    folder, what = out, f"--out {out}"
    if part.of > 1:
        folder, what = out / PARTS / str(part).replace(" ", "-"), f"{part} of --out {out}"
    elif is_in_bucket(out):
        folder = out / PARTS
    lock = lock_of(folder)
    with _writable(out):
        folder.mkdir(parents=True, exist_ok=True)
        if not lock.take():
            raise InputError(f"another process is writing {what}; wait until it has ended")
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
