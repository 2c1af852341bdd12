"""A folder in which small training runs are started, disturbed and read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from plt_jax.buckets.address import is_in_bucket
from plt_jax.checkpoint.steps import is_complete, list_steps
from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import write_corpus
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.files.paths import is_folder, to_path
from plt_jax.runs.directory import open_trained
from plt_jax.runs.metrics_file import read_metrics, without_times
from plt_jax.runs.names import CHECKPOINTS

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, CHECKPOINT_EVERY = 40, 5
TIMEOUT = 180
"""Seconds that a process, or a step of one, may take."""

SENTENCE = "the state of our union is strong and the work of peace goes on"

MODEL = {
    "vocab_size": 300,
    "max_length": 32,
    "width": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 32,
    "loop": {"window": 8},
}
TRAINING = {
    "steps": STEPS,
    "batch_size": 4,
    "log_every": 1,
    "evaluate_every": 10,
    "checkpoint_every": CHECKPOINT_EVERY,
}


class ProcessExit(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code; the negative number of the signal that ended it."""
    error: str
    """Its standard error."""


class RunResult(NamedTuple):
    """What two runs must have in common to be equal bit for bit."""

    rows: list[dict[str, Any]]
    """The rows of metrics.jsonl, without times and speeds."""
    parameters: str
    """SHA-256 of the last checkpoint's parameters."""


class Sandbox:
    """A folder with a corpus, and with the configurations and directories of runs."""

    def __init__(self, home: Path):
        """Prepares the corpus in the folder `home`."""
        self.home = home
        self.runs: str | None = None
        """The folder of run directories, if it is another than `home`."""
        self.texts = home / "texts.jsonl"
        self.corpus = home / "corpus"
        home.mkdir(parents=True, exist_ok=True)
        words = SENTENCE.split()
        draw = random.Random(0)
        documents = [" ".join(draw.choices(words, k=draw.randint(20, 90))) for _ in range(240)]
        rows = (json.dumps({"text": text}) + "\n" for text in documents)
        self.texts.write_text("".join(rows), encoding="utf-8")
        self.tokenizer = train_tokenizer(documents, MODEL["vocab_size"], 2)
        self.options = CorpusOptions(validation_fraction=0.1, shard_bytes=2**14)
        write_corpus([str(self.texts)], self.corpus, self.tokenizer, self.options, 1, _no_progress)

    def config(self, name: str, corpus: Path | str | None = None, **sections: Any) -> Path:
        """Writes the configuration of a run called `name`, and returns its path."""
        values = {
            "run_dir": f"{self.runs}/{name}" if self.runs else str(self.home / name / "run"),
            "model": MODEL,
            "data": {"sources": [{"path": str(corpus or self.corpus)}]},
            "optimizer": {"learning_rate": 1e-2},
            "training": TRAINING,
            "evaluation": {"batch_size": 4, "sequences": 4},
            **sections,
        }
        path = self.home / name / "run.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def start(self, config: Path, *options: str, script: str | None = None) -> TrainingProcess:
        """Starts training; `script` is Python that runs first, in the same process."""
        command = [sys.executable, str(REPOSITORY / "train.py"), str(config), *options]
        if script is not None:
            command[1:2] = [
                "-c",
                f"{script}\nimport runpy\nrunpy.run_path({command[1]!r}, run_name='__main__')",
            ]
        return TrainingProcess(command, run_of(config), config.parent / "stderr")

    def result(self, config: Path) -> RunResult:
        """Reads a finished run."""
        directory = run_of(config)
        rows = [without_times(row) for row in read_metrics(directory)]
        leaves, _ = jax.tree.flatten(open_trained(directory).params)
        digest = hashlib.sha256()
        for leaf in leaves:
            digest.update(np.asarray(leaf).tobytes())
        return RunResult(rows, digest.hexdigest())


class TrainingProcess:
    """A process that trains."""

    def __init__(self, command: list[str], run: Path, errors: Path):
        self.run = run
        self._errors = errors
        with errors.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Waits until a condition holds; returns False if the process ends first.

        Raises:
          TimeoutError: neither happens in time; the process is killed.
        """
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the condition did not hold within {TIMEOUT} s in {self.run}")
            time.sleep(0.2 if is_in_bucket(self.run) else 0.001)
        return True

    def wait_for_step(self, step: int) -> bool:
        """Waits until a step is logged."""
        return self.wait_for(lambda: last_step(self.run) >= step)

    def wait_for_save(self) -> bool:
        """Waits until a checkpoint is being written."""
        return self.wait_for(lambda: is_being_saved(self.run / CHECKPOINTS))

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> ProcessExit:
        """Sends SIGKILL, and waits for the end."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self) -> ProcessExit:
        """Waits for the end.

        Raises:
          subprocess.TimeoutExpired: it does not end in time, and is killed.
        """
        try:
            code = self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        return ProcessExit(code, self.read_errors().strip())

    def read_errors(self) -> str:
        """Standard error so far."""
        return self._errors.read_text(encoding="utf-8", errors="replace")


def run_of(config: Path) -> Path:
    """The run directory that a configuration names."""
    return to_path(yaml.safe_load(config.read_text(encoding="utf-8"))["run_dir"])


def is_being_saved(folder: Path) -> bool:
    """Whether the folder of a run's checkpoints has one that is not complete."""
    if is_in_bucket(folder):
        return is_folder(folder) and not all(map(is_complete, folder.iterdir()))
    return bool(list(folder.glob("*.unfinished*")))


def last_step(run: Path) -> int:
    """The newest logged step; 0 if there is none."""
    return max((row["step"] for row in read_metrics(run)), default=0)


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of the newest checkpoint; None if there is none."""
    steps = list_steps(run / CHECKPOINTS)
    return run / CHECKPOINTS / str(steps[-1]) if steps else None


def damage(path: Path, kind: str, draw: random.Random) -> str:
    """Damages a file as `kind` names (flipped, truncated or missing); returns what it did."""
    if kind == "missing":
        path.unlink()
        return f"{path.name} removed"
    contents = bytearray(path.read_bytes())
    if kind == "truncated":
        length = draw.randrange(len(contents))
        path.write_bytes(contents[:length])
        return f"{path.name} cut to {length} of {len(contents)} bytes"
    place, bit = draw.randrange(len(contents)), draw.randrange(8)
    contents[place] ^= 1 << bit
    path.write_bytes(contents)
    return f"bit {bit} of byte {place} of {path.name} flipped"


def copy_corpus(sandbox: Sandbox, name: str) -> Path:
    """Copies the corpus for a trial that damages it."""
    return Path(shutil.copytree(sandbox.corpus, sandbox.home / name / "corpus"))


def _no_progress(*_):
    return lambda unit, done: None
