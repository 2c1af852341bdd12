"""How long training waits for data that is in a bucket.

python -m benchmarks.data_in_bucket CORPUS [--out FOLDER]

It copies a tokenized corpus into an emulator of a bucket, a process of its own whose answers are
late as those of a real one are, and reads batches of it in shuffled order as training does: between
two batches it sleeps as long as a step takes. What it reports is the time that a step waits for its
batch. In every round each way of reading begins with an empty cache, but for "warm".
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.data import command_of, write_figures
from benchmarks.faults.bucket_server import BUCKET, BucketServer, Disturbance
from benchmarks.faults.buckets import is_shard
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import RunConfig
from plt_jax.config.data import DataConfig
from plt_jax.data.pipeline import Source, training_dataset
from plt_jax.data.shard_cache import LEAST_SHARDS
from plt_jax.data.tokenized_corpus import TokenizedCorpus, open_tokenized_corpus
from plt_jax.errors import InputError
from plt_jax.files.folders import copy_file
from plt_jax.files.paths import files_in, to_path
from plt_jax.reports.tables import table_of

SETTLE_SECONDS = 2
"""Time in which shards that were requested last arrive, before the next way begins."""
COLUMNS = (
    ("first", "first batch s", "{:.2f}"),
    ("median", "later: median ms", "{:.1f}"),
    ("slowest", "99 % ms", "{:.1f}"),
    ("fetched", "shards fetched", "{:,.0f}"),
)


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.data_in_bucket", description=__doc__)
    parser.add_argument("corpus", help="folder on a disk that plt_jax.data.prepare made")
    parser.add_argument("--length", type=int, default=2048, help="tokens of an example")
    parser.add_argument("--batch", type=int, default=8, help="examples per batch")
    parser.add_argument("--batches", type=int, default=60, help="batches read in one measurement")
    parser.add_argument("--step", type=float, default=0.2, help="seconds of a step")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of every answer")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each is measured")
    parser.add_argument("--out", help="folder for data_in_bucket.json and data_in_bucket.txt")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.batches - 1, arguments.rounds) < 1:
        raise InputError("--batch and --rounds must be at least 1, --batches at least 2")
    near = open_tokenized_corpus(arguments.corpus)
    with serving(arguments.latency) as count_fetches, tempfile.TemporaryDirectory() as home:
        bucket = to_path(f"gs://{BUCKET}/corpus")
        for name in files_in(near.folder):
            copy_file(near.folder / name, bucket / name)
        rounds = [
            {
                label: waits(read(Path(home, f"{number}"), bucket, near), count_fetches, arguments)
                for label, read in WAYS.items()
            }
            for number in range(arguments.rounds)
        ]
    rows = [
        {
            "label": label,
            **{
                name: statistics.median(found[label][name] for found in rounds)
                for name, *_ in COLUMNS
            },
        }
        for label in WAYS
    ]
    text = table_of(COLUMNS, rows)
    print(text)
    if arguments.out:
        found = {
            "command": command_of("benchmarks.data_in_bucket"),
            "shards": [shard.size for shard in near.shards("training")],
            "rounds": rounds,
        }
        write_figures(Path(arguments.out) / "data_in_bucket", found, text)


@contextmanager
def serving(latency: float) -> Iterator[Callable[[], int]]:
    """Runs a bucket in another process, which this one uses from now on. Yields a function that
    returns how many shards have been asked for so far."""
    context = multiprocessing.get_context("spawn")
    own, its = context.Pipe()
    process = context.Process(target=serve, args=(its, latency), daemon=True)
    process.start()
    os.environ.update(own.recv())

    def count_fetches() -> int:
        own.send(None)
        return own.recv()

    try:
        yield count_fetches
    finally:
        process.terminate()
        process.join()


def serve(pipe: Connection, latency: float) -> None:
    """Serves a bucket whose answers are late, until the process is ended; tells how many shards
    have been asked for, whenever it is asked. (A shard smaller than 8 MiB is one call.)"""
    with BucketServer(lambda _: Disturbance(delay=latency)) as server:
        pipe.send(server.environment)
        while True:
            pipe.recv()
            pipe.send(sum(is_shard(request) for request in server.requests))


def on_a_disk(home: Path, bucket: Path, near: TokenizedCorpus) -> Source:
    return Source("the corpus", near.stream("training"))


def in_a_bucket(home: Path, bucket: Path, share: float, ahead: bool) -> Source:
    """The corpus in the bucket, with a cache for a share of its bytes."""
    shards = open_tokenized_corpus(bucket).shards("training")
    most = sum(shard.size for shard in shards) * share
    if most < LEAST_SHARDS * max(shard.size for shard in shards):
        raise InputError("the corpus has too few shards; prepare it with a smaller --shard_mib")
    config = DataConfig(cache_dir=str(home), cache_gb=most / 1e9)
    far = open_tokenized_corpus(bucket, config)
    assert far.cache is not None
    source = Source("the corpus", far.stream("training"))
    if ahead:
        source = source._replace(
            ahead=far.cache.examples_ahead(shards), request=far.request("training")
        )
    return source


WAYS: dict[str, Callable[[Path, Path, TokenizedCorpus], Source]] = {
    "disk": on_a_disk,
    "bucket": lambda home, bucket, near: in_a_bucket(home / "whole", bucket, 1.01, True),
    "bucket, warm": lambda home, bucket, near: in_a_bucket(home / "whole", bucket, 1.01, True),
    "bucket, cache of half": lambda home, bucket, near: in_a_bucket(
        home / "half", bucket, 0.5, True
    ),
    "bucket, not ahead": lambda home, bucket, near: in_a_bucket(home / "late", bucket, 1.01, False),
}


def waits(source: Source, count_fetches: Callable[[], int], arguments) -> dict[str, float]:
    """Seconds that the first step waits for its batch, milliseconds of the later ones, and the
    number of shards that were fetched."""
    config = RunConfig.model_validate(
        {
            "model": {"max_length": arguments.length},
            "training": {"batch_size": arguments.batch},
        }
    )
    batches, found = iter(training_dataset(config, [source])), []
    before = count_fetches()
    for _ in range(arguments.batches):
        start = time.perf_counter()
        next(batches)
        found.append(time.perf_counter() - start)
        time.sleep(arguments.step)
    del batches
    time.sleep(SETTLE_SECONDS)
    first, later = found[0], sorted(1000 * wait for wait in found[1:])
    return {
        "first": first,
        "median": statistics.median(later),
        "slowest": later[min(len(later) * 99 // 100, len(later) - 1)],
        "fetched": count_fetches() - before,
    }


if __name__ == "__main__":
    run_command(main)
