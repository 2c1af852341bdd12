"""The faults: each disturbs a run, lets it go on as its user would, and says what came of it."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.disks import fill, remount, small_disk
from benchmarks.faults.sandbox import (
    PATIENCE,
    REPOSITORY,
    STEPS,
    Ended,
    Outcome,
    Process,
    Sandbox,
    copy_corpus,
    damage,
    newest_checkpoint,
)
from plt_jax.checkpoint.manifest import find_damage
from plt_jax.checkpoint.steps import list_steps
from plt_jax.data.corpus_reader import MANIFEST, open_prepared
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import CHECKPOINTS


class Case(NamedTuple):
    """One fault, about to happen."""

    sandbox: Sandbox
    expected: Outcome
    """Of an undisturbed run."""
    name: str
    draw: random.Random

    def compare(self, config: Path) -> None:
        """Raises AssertionError where a finished run is not the undisturbed one, bit for bit."""
        found = self.sandbox.outcome(config)
        require(found.rows == self.expected.rows, "the metrics differ from the undisturbed run's")
        require(found.parameters == self.expected.parameters, "the parameters differ")


Fault = Callable[[Case], str]
"""Returns what happened; raises AssertionError where that is not what should have."""


def require(condition: bool, otherwise: str) -> None:
    """Raises AssertionError with a text."""
    if not condition:
        raise AssertionError(otherwise)


def require_line(ended: Ended, code: int, *parts: str, alone: bool = True) -> str:
    """Checks that a process ended with a code and one line of error that holds all parts.

    Args:
      alone: without a stack trace beside it, such as libraries print in threads of their own.
    """
    lines = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    require(ended.code == code, f"exit code {ended.code} instead of {code}: {ended.error[-300:]}")
    require(bool(lines), f"no line of error: {ended.error[-300:]}")
    require(not alone or len(lines) == 1, f"{len(lines)} lines of error instead of one")
    for part in parts:
        require(part in lines[0], f"{part!r} is not in the error {lines[0]!r}")
    require(not alone or "Traceback" not in ended.error, "there is a stack trace")
    return lines[0]


def finish(case: Case, config: Path, *options: str) -> None:
    """Resumes a run, which must end as the undisturbed one."""
    ended = case.sandbox.start(config, *options).end()
    require(ended.code == 0, f"resuming ended with {ended.code}: {ended.error[-300:]}")
    case.compare(config)


def killed(wait: Callable[[Case, Process], str]) -> Fault:
    """SIGKILL once `wait` returns, which says when that is."""

    def fault(case: Case) -> str:
        config = case.sandbox.config(case.name)
        process = case.sandbox.start(config)
        when = wait(case, process)
        process.kill()
        finish(case, config)
        return f"killed {when}; went on bit for bit"

    return fault


def at_a_random_moment(case: Case, process: Process) -> str:
    step, delay = case.draw.randrange(STEPS), case.draw.random() * 0.05
    process.wait_for_step(step)
    time.sleep(delay)
    return f"{1000 * delay:.0f} ms after step {step}"


def while_starting(case: Case, process: Process) -> str:
    delay = case.draw.uniform(0.5, 6)
    time.sleep(delay)
    return f"{delay:.1f} s after its start"


def during_a_save(case: Case, process: Process) -> str:
    process.wait_for_step(case.draw.randrange(STEPS - 5))
    process.wait_for_save()
    delay = case.draw.random() * 0.1
    time.sleep(delay)
    return f"{1000 * delay:.0f} ms into a save"


def kill_again_and_again(case: Case) -> str:
    config = case.sandbox.config(case.name)
    steps = []
    for _ in range(4):
        process = case.sandbox.start(config)
        # A kill between two saves may throw the run back to where it was: ask for progress.
        steps.append(min(STEPS - 1, (steps[-1] if steps else 0) + case.draw.randint(6, 9)))
        process.wait_for_step(steps[-1])
        process.kill()
    finish(case, config)
    return f"killed at steps {', '.join(map(str, steps))}; went on bit for bit"


def terminate(case: Case) -> str:
    config = case.sandbox.config(case.name)
    number = case.draw.choice([signal.SIGTERM, signal.SIGINT])
    process = case.sandbox.start(config)
    step = case.draw.randint(1, STEPS - 6)
    process.wait_for_step(step)
    process.signal(number)
    ended = process.end()
    require(ended.code == 3, f"exit code {ended.code} instead of 3: {ended.error[-300:]}")
    finish(case, config)
    return f"{number.name} at step {step}: saved, exit code 3; went on bit for bit"


def terminate_twice(case: Case) -> str:
    config = case.sandbox.config(case.name)
    process = case.sandbox.start(config)
    process.wait_for_step(case.draw.randint(1, STEPS - 6))
    process.signal(signal.SIGTERM)
    delay = case.draw.random() * 0.3
    time.sleep(delay)
    process.signal(signal.SIGTERM)
    code = process.end().code
    finish(case, config)
    return (
        f"a second SIGTERM {1000 * delay:.0f} ms after the first: code {code}; went on bit for bit"
    )


def damaged_checkpoint(kind: str) -> Fault:
    def fault(case: Case) -> str:
        config = case.sandbox.config(case.name, checkpoint={"keep": 3})
        process = case.sandbox.start(config)
        process.wait_for_step(case.draw.randint(12, STEPS - 3))
        process.wait_for(lambda: len(list_steps(process.run / CHECKPOINTS)) > 1)
        process.kill()
        newest = newest_checkpoint(process.run)
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        done = damage(case.draw.choice(files), kind, case.draw)
        ended = case.sandbox.start(config).end()
        require_line(ended, 2, str(newest), "damaged", "--checkpoint.skip_damaged")
        finish(case, config, "--checkpoint.skip_damaged", "true")
        return f"{done}: named, refused; skipped by choice, bit for bit"

    return fault


def damaged_shard(kind: str) -> Fault:
    def fault(case: Case) -> str:
        corpus = copy_corpus(case.sandbox, case.name)
        config = case.sandbox.config(case.name, corpus)
        shards = open_prepared(corpus).manifest.shards
        shard = case.draw.choice([one for one in shards if one.split == "training"])
        process = case.sandbox.start(config)
        process.wait_for_step(case.draw.randint(1, STEPS - 6))
        process.kill()
        path = corpus / shard.name
        whole = path.read_bytes()
        # Behind what pads a small file there is nothing to damage: only where records lie.
        done = damage(path, kind, case.draw)
        ended = case.sandbox.start(config).end()
        if ended.code == 0:
            case.compare(config)
            found = subprocess.run(
                [sys.executable, "-m", "plt_jax.data.verify", str(corpus)],
                **{"cwd": REPOSITORY, "capture_output": True, "text": True},
            )
            require(found.returncode == 1 and shard.name in found.stderr, "verify does not find it")
            return f"{done}, in what pads the file: no token differs, bit for bit; verify names it"
        require_line(ended, 2, shard.name)
        path.write_bytes(whole)
        finish(case, config)
        return f"{done}: named; brought back, bit for bit"

    return fault


def lost_corpus(case: Case) -> str:
    corpus = copy_corpus(case.sandbox, case.name)
    config = case.sandbox.config(case.name, corpus)
    process = case.sandbox.start(config)
    process.wait_for_step(case.draw.randint(1, STEPS - 6))
    process.kill()
    shutil.rmtree(corpus)
    require_line(case.sandbox.start(config).end(), 2, str(corpus), MANIFEST)
    shutil.copytree(case.sandbox.corpus, corpus)
    finish(case, config)
    return "the corpus removed: named; brought back, bit for bit"


def full_disk(case: Case) -> str:
    folder = case.sandbox.home / case.name / "run"
    config = case.sandbox.config(case.name)
    folder.mkdir(parents=True)
    size = case.draw.randint(260, 700)
    with small_disk(folder, f"{size}k"):
        ended = case.sandbox.start(config).end()
        code = 2 if ended.code == 2 else 1  # by whether it was full before the first step
        error = require_line(ended, code, "No space left", alone=False)
        remount(folder, "size=64m")
        finish(case, config)
    what = error.partition(": ")[2].split(str(case.sandbox.home))[0]
    return f"a disk of {size} KiB: {what}... named; given more, bit for bit"


def disk_fills_up(case: Case) -> str:
    folder = case.sandbox.home / case.name / "run"
    config = case.sandbox.config(case.name)
    folder.mkdir(parents=True)
    with small_disk(folder, "64m"):
        process = case.sandbox.start(config)
        step = case.draw.randint(3, STEPS - 6)
        process.wait_for_step(step)
        fill(folder / "filler")
        ended = process.end()
        require_line(ended, 1, "No space left", alone=False)
        (folder / "filler").unlink()
        finish(case, config)
    return f"the disk full after step {step}: named, exit code 1; emptied, bit for bit"


def read_only_disk(case: Case) -> str:
    folder = case.sandbox.home / case.name / "run"
    config = case.sandbox.config(case.name)
    folder.mkdir(parents=True)
    with small_disk(folder, "64m"):
        process = case.sandbox.start(config)
        process.wait_for_step(case.draw.randint(1, STEPS - 6))
        process.kill()
        remount(folder, "ro")
        require_line(case.sandbox.start(config).end(), 2, "Read-only file system")
        remount(folder, "rw")
        finish(case, config)
    return "read-only when resuming: named; writable again, bit for bit"


SLOW = """
import time
from plt_jax.checkpoint import store
take = store.take_checksums
def slowly(*arguments):
    time.sleep({seconds})
    return take(*arguments)
store.take_checksums = slowly
"""


def slow_disk(case: Case) -> str:
    """Every save takes seconds more, many times as long as the steps between two."""
    config, seconds = case.sandbox.config(case.name), case.draw.uniform(1.5, 3.0)
    script = SLOW.format(seconds=seconds)
    process = case.sandbox.start(config, "--training.hang_after", "0.5", script=script)
    process.wait_for_step(case.draw.randint(11, STEPS - 6))
    before = process.said().count("saving has taken")
    named = process.wait_for(lambda: process.said().count("saving has taken") > before)
    ended = process.kill()
    require(named, f"it is not named: {ended.error[-300:]}")
    newest = newest_checkpoint(process.run)
    require(newest is not None and not find_damage(newest), "the last checkpoint is not intact")
    finish(case, config)
    return f"each save takes {seconds:.1f} s more: named; killed, bit for bit"


SPOIL = """
import numpy as np
from plt_jax.data import pipeline
read = pipeline._Rows.__getitem__
def spoil(rows, index):
    example = read(rows, index)
    if index // 4 in {batches}:
        example = example | {{"weights": np.full_like(example["weights"], {value})}}
    return example
pipeline._Rows.__getitem__ = spoil
"""


def bad_batches(count: int) -> Fault:
    def fault(case: Case) -> str:
        first = case.draw.randint(6, STEPS - 12)
        value = case.draw.choice(["np.nan", "np.inf"])
        script = SPOIL.format(batches=set(range(first, first + count)), value=value)
        sections = {"guard": {"patience": 4}}
        whole, broken = (
            case.sandbox.config(f"{case.name}-{part}", **sections) for part in ("whole", "broken")
        )
        ended = case.sandbox.start(whole, script=script).end()
        require(ended.code == 0, f"exit code {ended.code}: {ended.error[-300:]}")
        rows = read_metrics(whole.parent / "run")
        skipped = sum(row.get("skipped", 0) for row in rows)
        back = [row for row in rows if "rolled_back_from" in row]
        # So many that it must go back leave no skipped step in what is gone on with.
        require(skipped == count or (back and skipped < count), f"{skipped} steps were skipped")
        require(bool(back) == (count > 5), f"{len(back)} rollbacks")
        process = case.sandbox.start(broken, script=script)
        process.wait_for_step(case.draw.randint(first, STEPS - 2))
        process.kill()
        ended = case.sandbox.start(broken, script=script).end()
        require(ended.code == 0, f"exit code {ended.code}: {ended.error[-300:]}")
        one, other = case.sandbox.outcome(whole), case.sandbox.outcome(broken)
        require(one.parameters == other.parameters, "killed and gone on with, parameters differ")
        done = "gone back from, passed over" if back else "skipped, counted"
        return f"{count} batches of {value[3:]} from step {first + 1}: {done}; killed, bit for bit"

    return fault


def other_processes(case: Case) -> str:
    config = case.sandbox.config(case.name)
    first, second = case.draw.choice([(1, 2), (2, 1)])
    step = case.draw.randint(2, STEPS - 12)
    run_processes(case, config, first, stop_at=step)
    run_processes(case, config, second)
    found = case.sandbox.outcome(config).rows
    for ours, right in zip(found, case.expected.rows, strict=True):
        for name, value in right.items():
            require(
                abs(ours[name] - value) <= 1e-4 * max(abs(value), 1e-3),
                f"{name} is {ours[name]} instead of {value} at step {right['step']}",
            )
    return f"SIGTERM in {first} process{'es' * (first > 1)} at step {step}, went on in {second}"


def run_processes(case: Case, config: Path, count: int, stop_at: int | None = None) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    together: list[Process] = []
    for index in range(count):
        options = []
        if count > 1:
            names = {"coordinator": f"localhost:{port}", "count": count, "index": index}
            options = [f"--processes.{name}={value}" for name, value in names.items()]
            options.append("--mesh.data=2")
        together.append(case.sandbox.start(config, *options))
    if stop_at is not None:
        together[0].wait_for_step(stop_at)
        together[-1].signal(signal.SIGTERM)
    for process in together:
        code = process.end().code
        require(code == (0 if stop_at is None else 3), f"exit code {code}")


def kill_preparation(case: Case) -> str:
    out = case.sandbox.home / case.name / "corpus"
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = case.sandbox.corpus / "tokenizer.json"
    # As Sandbox prepares it, but slowly.
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from plt_jax.data.corpus_writer import Options, prepare\n"
        "from plt_jax.data.tokenizer import load_tokenizer\n"
        "texts, out, tokenizer, pause = sys.argv[1:]\n"
        "prepare([texts], Path(out), load_tokenizer(tokenizer),\n"
        "        Options(validation_fraction=0.1, shard_bytes=2**14), 1,\n"
        "        lambda *_: lambda unit, done: time.sleep(float(pause)))\n"
    )
    command = [sys.executable, "-c", script, str(case.sandbox.texts), str(out), str(tokenizer)]
    started = subprocess.Popen([*command, "0.1"], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    units, delay = case.draw.randint(0, 4), case.draw.random() * 0.15
    deadline = time.monotonic() + PATIENCE
    while len(list(out.glob("parts/0*.json"))) < units and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    started.kill()
    started.wait()
    subprocess.run([*command, "0"], cwd=REPOSITORY, check=True)
    same = open_prepared(out).fingerprint == open_prepared(case.sandbox.corpus).fingerprint
    require(same, "the corpus differs from one that was prepared undisturbed")
    return f"killed {1000 * delay:.0f} ms after {units} finished shards; went on to the same corpus"


FAULTS: dict[str, tuple[Fault, int]] = {
    "SIGKILL at a random moment": (killed(at_a_random_moment), 8),
    "SIGKILL while starting": (killed(while_starting), 3),
    "SIGKILL during a save": (killed(during_a_save), 6),
    "SIGKILL four times": (kill_again_and_again, 2),
    "SIGTERM or SIGINT": (terminate, 5),
    "SIGTERM twice": (terminate_twice, 2),
    "checkpoint: a bit flipped": (damaged_checkpoint("flipped"), 5),
    "checkpoint: a file truncated": (damaged_checkpoint("truncated"), 3),
    "checkpoint: a file missing": (damaged_checkpoint("missing"), 2),
    "shard: a bit flipped": (damaged_shard("flipped"), 4),
    "shard: truncated": (damaged_shard("truncated"), 2),
    "shard: missing": (damaged_shard("missing"), 2),
    "corpus missing": (lost_corpus, 1),
    "disk too small": (full_disk, 2),
    "disk fills up": (disk_fills_up, 2),
    "disk read-only": (read_only_disk, 1),
    "disk slow": (slow_disk, 2),
    "a bad batch": (bad_batches(1), 2),
    "a stretch of bad batches": (bad_batches(7), 2),
    "other number of processes": (other_processes, 3),
    "SIGKILL while preparing data": (kill_preparation, 5),
}
"""What is tried, and how often."""
