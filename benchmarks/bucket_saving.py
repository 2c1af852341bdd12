"""How fast checkpoints are saved, verified and restored in a bucket, beside the disk.

python -m benchmarks.bucket_saving --megabytes 128

The bucket is the emulator of the tests, in memory, in a process of its own on the same machine. It
says what the calls of a save and a restore cost beside one object of the same bytes; it says
nothing of Google's service. Files leave the page cache before they are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.saving import forget
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.rounds import interleave, spread
from plt_jax.checkpoint.manifest import find_damage
from plt_jax.checkpoint.store import Checkpoints
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import CheckpointConfig
from plt_jax.errors import InputError
from plt_jax.files.paths import to_path
from plt_jax.files.writing import write_text
from plt_jax.reports.tables import table_of

ARRAYS = 4
COLUMNS = (
    ("seconds", "seconds", "{:.2f}"),
    ("seconds_min", "least", "{:.2f}"),
    ("seconds_max", "most", "{:.2f}"),
    ("gb_per_second", "GB/s", "{:.2f}"),
    ("of_object", "of one object", "{:.0%}"),
)
ROWS = ("one object written", "one object read", "save", "verify", "restore")


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.bucket_saving", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=128, help="size of the parameters")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each is measured")
    parser.add_argument("--folder", help="folder on the disk; default a temporary folder")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--serve", action="store_true", help="of this command: the bucket")
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    for name in ("megabytes", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    with started_bucket() as bucket, tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        places = {"disk": Place(folder, arguments.megabytes)}
        places["bucket"] = Place(f"gs://{bucket}/measured", arguments.megabytes)
        timers = {f"{name}, {row}": timer for name, place in places.items() for row, timer in place}
        seconds = interleave(timers, arguments.rounds)
    report = {
        "command": " ".join(["python -m benchmarks.bucket_saving", *sys.argv[1:]]),
        "machine": machine(),
        "bytes": places["disk"].bytes,
        "rows": rows_of(seconds, places["disk"].bytes),
    }
    print(table_of(COLUMNS, report["rows"]))
    if arguments.out:
        write_text(Path(arguments.out), json.dumps(report, indent=1) + "\n")


class Place:
    """A folder for checkpoints; its iterator gives what is measured, by row."""

    def __init__(self, folder: str, megabytes: int):
        self.folder, self.saved = to_path(folder), 0
        random, size = np.random.default_rng(0), megabytes * 10**6 // (4 * 4096 * ARRAYS)
        self.params = {
            f"x{number}": jax.device_put(random.standard_normal((size, 4096), np.float32))
            for number in range(ARRAYS)
        }
        self.optimizer = {"step": jax.device_put(np.zeros((), np.int32))}
        self.bytes = sum(leaf.nbytes for leaf in self.params.values())
        self.content = random.bytes(self.bytes)
        config = CheckpointConfig(keep=1, keep_best=0)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config)

    def __iter__(self) -> Iterator[tuple[str, Callable[[], float]]]:
        timers = (self.write, self.read, self.save, self.verify, self.restore)
        return zip(ROWS, (self.timed(timer) for timer in timers), strict=True)

    def timed(self, action: Callable[[], None]) -> Callable[[], float]:
        def timer() -> float:
            if isinstance(self.folder, Path):
                forget(self.folder.rglob("*"))
            start = time.perf_counter()
            action()
            return time.perf_counter() - start

        return timer

    def write(self) -> None:
        (self.folder / "object").write_bytes(self.content)
        if isinstance(self.folder, Path):
            os.sync()

    def read(self) -> None:
        (self.folder / "object").read_bytes()

    def save(self) -> None:
        self.saved += 1
        self.checkpoints.save(self.saved, self.params, self.optimizer, {"step": self.saved})
        self.checkpoints.wait()

    def verify(self) -> None:
        if damage := find_damage(self.folder / "checkpoints" / str(self.saved)):
            raise AssertionError(damage)

    def restore(self) -> None:
        abstract: Any = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            (self.params, self.optimizer),
        )
        jax.block_until_ready(self.checkpoints.restore(self.saved, *abstract)[:2])


def rows_of(seconds: dict[str, list[float]], size: int) -> list[dict[str, Any]]:
    """One row per figure; each is compared with one object in the same place."""
    rows = []
    for label, found in seconds.items():
        place, _, what = label.partition(", ")
        row = {"label": label, **spread("seconds", found)}
        row["gb_per_second"] = size / row["seconds"] / 1e9
        if not what.startswith("one"):
            other = "written" if what == "save" else "read"
            whole = statistics.median(seconds[f"{place}, one object {other}"])
            row["of_object"] = whole / row["seconds"]
        rows.append(row)
    return rows


@contextlib.contextmanager
def started_bucket() -> Iterator[str]:
    """Starts the emulator, makes it this process's service, and yields its bucket's name."""
    words = [sys.executable, "-m", "benchmarks.bucket_saving", "--serve"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as server:
        assert server.stdin is not None and server.stdout is not None
        told = json.loads(server.stdout.readline())
        os.environ |= told["environment"]
        yield told["bucket"]
        server.stdin.close()  # at which it ends


def serve() -> None:
    """Serves the bucket until the standard input ends."""
    from benchmarks.faults.bucket_server import BUCKET, BucketServer

    with BucketServer() as server:
        told = {"bucket": BUCKET, "environment": server.environment}
        print(json.dumps(told), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    run_command(main)
