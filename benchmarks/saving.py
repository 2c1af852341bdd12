"""How fast checkpoints are saved, verified and restored, compared with the disk's own speed.

python -m benchmarks.saving CONFIG --folder FOLDER

It saves the whole training state (parameters and optimizer) while it takes train steps on random
tokens. Every round takes a number of steps with a save at their start, and as many without one; the
save ends before the last step. The difference is the cost of a save. The disk's own speed is that
of one file of the state's size in the same folder. Files leave the page cache before they are read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from plt_jax.benchmarks.decode import nbytes
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.rounds import interleave, spread
from plt_jax.benchmarks.train import CompiledStep
from plt_jax.checkpoint.manifest import find_damage
from plt_jax.checkpoint.store import Checkpoints
from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import CheckpointConfig
from plt_jax.config.variants import Variant
from plt_jax.distributed.mesh import make_mesh
from plt_jax.errors import InputError
from plt_jax.files.writing import write_text
from plt_jax.reports.tables import table_of
from plt_jax.training.guard import Limits

PIECE = 64 * 2**20
"""Bytes of one write or read of the file that measures the disk."""
SLACK = 1.5
"""How long the steps beside a save take, as a multiple of the save alone."""
MAX_STEPS = 500

COLUMNS = (
    ("seconds", "seconds", "{:.2f}"),
    ("seconds_min", "least", "{:.2f}"),
    ("seconds_max", "most", "{:.2f}"),
    ("gb_per_second", "GB/s", "{:.2f}"),
    ("of_disk", "of the disk", "{:.0%}"),
)


def main(words: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    parser = CommandParser(prog="python -m benchmarks.saving", description=__doc__)
    parser.add_argument(
        "--folder", help="folder on the disk to measure; default a temporary folder"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how many times each is measured")
    parser.add_argument("--out", help="JSON file for the figures")
    config = parse_run_config(parser, words)
    arguments = parser.parse_args(words)
    if arguments.rounds < 1:
        raise InputError(f"--rounds is {arguments.rounds}; it must be at least 1")
    if arguments.folder is not None and not os.path.isdir(arguments.folder):
        raise InputError(f"--folder {arguments.folder} does not exist; make it on that disk")
    loop = config.model.loop
    step = CompiledStep.compile(Variant(loop.scheme, loop.count), config, make_mesh(config.mesh))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = SaveBenchmark(step, Path(folder)).measure(arguments.rounds)
    report = {
        "command": " ".join(["python -m benchmarks.saving", *words]),
        "machine": machine(),
        **found,
    }
    print(text_of(report))
    if arguments.out:
        write_text(Path(arguments.out), json.dumps(report, indent=1) + "\n")


class SaveBenchmark:
    """A training state that steps change and checkpoints hold."""

    def __init__(self, step: CompiledStep, folder: Path):
        self.step, self.folder = step, folder
        self.state = step.program.init_state()
        self.bytes = nbytes(self.state)
        self.checkpoints = Checkpoints(
            folder / "checkpoints", CheckpointConfig(keep=1, keep_best=0)
        )
        self.saved = 0

    def measure(self, rounds: int) -> dict[str, Any]:
        """The report's figures; times are in seconds, medians with their smallest and largest."""
        self.take_steps(1)  # the first copies between host and device are slower
        self.save()
        self.checkpoints.wait()
        alone = interleave(
            {
                "disk written": self.write_file,
                "disk read": self.read_file,
                "save, until steps go on": self.save_until_copied,
                "save, until complete": self.save_until_complete,
                "verify": self.verify,
                "restore": self.restore,
            },
            rounds,
        )
        step = statistics.median(self.take_steps(1) for _ in range(5))
        longest = max(alone["save, until complete"])
        steps = min(math.ceil(SLACK * longest / step), MAX_STEPS)
        beside = interleave(
            {
                "without": functools.partial(self.take_steps, steps),
                "with": functools.partial(self.take_steps, steps, True),
            },
            rounds,
        )
        with_save, without = beside["with"], beside["without"]
        cost = [one - other for one, other in zip(with_save, without, strict=True)]
        step = statistics.median(without) / steps
        every = self.step.program.config.training.checkpoint_every
        return {
            "model": self.step.program.config.model.model_dump(mode="json"),
            "state_bytes": self.bytes,
            "rows": rows_of(alone, self.bytes),
            "steps_a_round": steps,
            "step_seconds": step,
            "steps_with_a_save": with_save,
            "steps_without": without,
            "save_costs": spread("seconds", cost),
            "checkpoint_every": every,
            "share_of_step_time": statistics.median(cost) / (every * step),
        }

    def take_steps(self, steps: int, saving: bool = False) -> float:
        """Seconds of some steps. Like training, it starts a step before the last one has ended."""
        jax.block_until_ready(self.state)
        before = None
        start = time.perf_counter()
        if saving:
            self.save()
        for _ in range(steps):
            self.state, metrics = self.step.compiled(self.state, self.step.batch, Limits())
            jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(before)
        taken = time.perf_counter() - start
        self.checkpoints.wait()
        return taken

    def save(self) -> None:
        self.saved += 1
        optimizer = {"step": self.state.step, "opt_state": self.state.opt_state}
        self.checkpoints.save(self.saved, self.state.params, optimizer, {"step": self.saved})

    def save_until_copied(self) -> float:
        """Seconds until the arrays are copied, after which steps continue."""
        start = time.perf_counter()
        self.save()
        taken = time.perf_counter() - start
        self.checkpoints.wait()
        return taken

    def save_until_complete(self) -> float:
        """Seconds until the checkpoint and its checksums are on the disk."""
        start = time.perf_counter()
        self.save()
        self.checkpoints.wait()
        return time.perf_counter() - start

    def verify(self) -> float:
        """Seconds of checking the newest checkpoint's checksums.

        Raises:
          AssertionError: it is damaged.
        """
        forget(self.newest().rglob("*"))
        start = time.perf_counter()
        if damage := find_damage(self.newest()):
            raise AssertionError(damage)
        return time.perf_counter() - start

    def restore(self) -> float:
        """Seconds of reading the newest checkpoint onto the devices."""
        forget(self.newest().rglob("*"))
        abstract = self.step.program.abstract_state
        optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
        start = time.perf_counter()
        restored = self.checkpoints.restore(self.saved, abstract.params, optimizer)
        jax.block_until_ready(restored[:2])
        return time.perf_counter() - start

    def newest(self) -> Path:
        return self.folder / "checkpoints" / str(self.saved)

    def write_file(self) -> float:
        """Seconds of writing one file of the state's size, until it is on the disk."""
        piece = os.urandom(PIECE)
        start = time.perf_counter()
        with (self.folder / "file").open("wb", buffering=0) as file:
            for begin in range(0, self.bytes, PIECE):
                file.write(memoryview(piece)[: self.bytes - begin])
            os.fsync(file.fileno())
        return time.perf_counter() - start

    def read_file(self) -> float:
        """Seconds of reading that file."""
        forget([self.folder / "file"])
        piece = bytearray(PIECE)
        start = time.perf_counter()
        with (self.folder / "file").open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
        return time.perf_counter() - start


def forget(paths: Iterable[Path]) -> None:
    """Writes files to the disk, and removes them from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rows_of(seconds: dict[str, list[float]], size: int) -> list[dict[str, Any]]:
    """One row per figure; saves are compared with writing the file, the others with reading it."""
    rows = []
    for label, found in seconds.items():
        row = {"label": label, **spread("seconds", found)}
        if label != "save, until steps go on":
            row["gb_per_second"] = size / row["seconds"] / 1e9
            disk = "disk written" if "save" in label else "disk read"
            row["of_disk"] = statistics.median(seconds[disk]) / row["seconds"]
        if label.startswith("disk"):
            del row["of_disk"]
        rows.append(row)
    return rows


def text_of(report: dict[str, Any]) -> str:
    """The figures as a table, and the cost of a save."""
    about, cost = report["machine"], report["save_costs"]
    return "\n".join(
        [
            f"{report['state_bytes'] / 1e9:.2f} GB of state; {about['device']} "
            f"({about['processor']}, {about['cores']} cores), Python {about['python']}, "
            f"jax {about['jax']}",
            table_of(COLUMNS, report["rows"]),
            f"beside {report['steps_a_round']} steps of {1e3 * report['step_seconds']:.1f} ms, a "
            f"save costs {cost['seconds']:.2f} s ({cost['seconds_min']:.2f} to "
            f"{cost['seconds_max']:.2f}): {report['share_of_step_time']:.2%} of step time with "
            f"one every {report['checkpoint_every']} steps",
        ]
    )


if __name__ == "__main__":
    run_command(main)
