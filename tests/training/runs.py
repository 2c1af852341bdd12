"""Tiny training runs over a small corpus, and the commands as tests call them.

Runs made here differ in nothing that reaches a compiled program unless a test says so, so that the
compilation cache serves most of them.
"""

import contextlib
import functools
import io
import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import yaml

from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import Checkpoints
from plt_jax.config import RunConfig
from plt_jax.config.yaml_file import merge
from plt_jax.distributed.mesh import make_mesh
from plt_jax.runs.metrics_file import read_metrics, without_times
from plt_jax.runs.names import CHECKPOINTS
from plt_jax.training import trainer
from plt_jax.training.journal import Journal
from plt_jax.training.program import TrainProgram
from tests.conftest import CACHE, QUICK_FLAGS

REPOSITORY = Path(__file__).parents[2]
STEPS = 8
"""Steps of a run; one epoch of the corpus is between five and six."""
SENTENCE = "the state of our union is strong and the work of peace goes on in every land"


def make_home(home: Path) -> Path:
    """Makes a folder with a corpus of twelve short documents, about twenty examples of 16."""
    folder = home / "corpus"
    folder.mkdir(parents=True)
    words = SENTENCE.split()
    for number in range(12):
        text = " ".join(words[(number * 7 + word * word) % len(words)] for word in range(12))
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return home


def tiny_values(home: Path, **sections: Any) -> dict[str, Any]:
    """The nested values of a run's config; sections given as keywords are laid over them."""
    values = {
        "model": {
            "vocab_size": 270,
            "max_length": 16,
            "width": 8,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "ffn_width": 12,
            "loop": {"window": 5},
        },
        "data": {
            "source": str(home / "corpus"),
            "validation_fraction": 0.25,
            "cache_dir": str(home / "cache"),
        },
        "optimizer": {"learning_rate": 1e-2},
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "log_every": 1,
            "evaluate_every": 4,
            "checkpoint_every": 4,
        },
        "evaluation": {"batch_size": 4, "sequences": 2},
    }
    return merge(values, sections)


def tiny_config(home: Path, run_dir: Path | str, **sections: Any) -> RunConfig:
    """A validated config of a tiny run that writes to `run_dir`."""
    return RunConfig.model_validate(tiny_values(home, run_dir=str(run_dir), **sections))


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Writes nested values as YAML."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class Finished(NamedTuple):
    """A run trained to its end, that no test may change."""

    home: Path
    """Holds the corpus and the cache."""
    config: RunConfig
    directory: Path

    def copy(self, target: Path) -> RunConfig:
        """Copies the run directory, for a test that changes it; returns the copy's config."""
        shutil.copytree(self.directory, target)
        return self.config.model_copy(update={"run_dir": str(target)})


@functools.cache
def finished_run(base: Path) -> Finished:
    """The run that all tests of a session share, made once under pytest's base folder."""
    home = make_home(base / "tiny")
    config = tiny_config(home, home / "finished")
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = trainer.train(config)
    assert outcome == trainer.Outcome(STEPS, stopped=False)
    return Finished(home, config, home / "finished")


class Saved(NamedTuple):
    """What a run's newest checkpoint holds."""

    step: int
    params: Any
    optimizer: Any
    data: Any


def saved_state(config: RunConfig) -> Saved:
    """Reads the newest checkpoint of a run back."""
    abstract = TrainProgram.build(config, make_mesh(config.mesh)).abstract_state
    directory = config.directory / CHECKPOINTS
    with Checkpoints(directory, config.checkpoint) as saved:
        optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
        step = list_steps(directory)[-1]
        params, optimizer, data = saved.restore(step, abstract.params, optimizer)
    state = jax.tree.map(np.asarray, (params, optimizer))
    return Saved(step, *state, data)


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    """Same newest checkpoint, bit for bit, and the same numbers in metrics.jsonl."""
    left, right = saved_state(one), saved_state(other)
    assert left.step == right.step
    assert left.data == right.data
    for part in ("params", "optimizer"):
        leaves, tree = jax.tree.flatten_with_path(getattr(left, part))
        others, other_tree = jax.tree.flatten(getattr(right, part))
        assert tree == other_tree
        for (path, leaf), against in zip(leaves, others, strict=True):
            assert leaf.dtype == against.dtype
            assert np.array_equal(leaf, against), jax.tree_util.keystr(path)
    assert numbers(one) == numbers(other)


def numbers(config: RunConfig) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without times and speeds, which no two runs share."""
    return [without_times(row) for row in read_metrics(config.directory)]


def flat(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers, those of loops and layers as NAME/0/2, so that rows can be compared with a
    tolerance."""
    return {
        "/".join([name, *map(str, index)]): float(one)
        for name, value in row.items()
        for index, one in np.ndenumerate(value)
    }


def flat_numbers(values: Any, where: str = "") -> dict[str, float]:
    """All numbers in nested mappings and lists, by their places, as by_loop/0/loss."""
    if isinstance(values, int | float):
        return {where: float(values)}
    parts: dict[Any, Any] = values if isinstance(values, dict) else {}
    if isinstance(values, list):
        parts = dict(enumerate(values))
    found: dict[str, float] = {}
    for name, value in parts.items():
        found |= flat_numbers(value, f"{where}/{name}" if where else str(name))
    return found


def losses(config: RunConfig) -> dict[int, float]:
    """Training losses by step."""
    return {row["step"]: row["loss"] for row in numbers(config) if "loss" in row}


def call_at(step: int, action) -> Any:
    """Patches training so that `action` is called when a step has just been logged."""
    log_step = Journal.log_step

    def log_and_act(journal, at, *others):
        log_step(journal, at, *others)
        if at == step:
            action()

    return mock.patch.object(Journal, "log_step", log_and_act)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the contents of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command(name: str, *words: object) -> Result:
    """Runs train.py, eval.py or the module plt_jax.generate in this process, as its user would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch("plt_jax.commands.parser.divert_background_traces"),  # pytest has hooks, too
        mock.patch("sys.argv", [name, *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            if name.endswith(".py"):
                runpy.run_path(str(REPOSITORY / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=False)
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def output_of(name: str, *words: object) -> str:
    """What a command prints that must succeed, and say nothing on stderr."""
    result = command(name, *words)
    assert (result.code, result.err) == (0, ""), result
    return result.out


def assert_refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds all the parts."""
    assert result.code == 2, result
    assert result.err.startswith("error: ") and result.err.endswith("\n")
    assert len(result.err.splitlines()) == 1, result.err
    for part in parts:
        assert part in result.err


def simulated(devices: int) -> dict[str, str]:
    """Variables of a process that sees so many CPU devices.

    With one collective at a time: they wait for one another for ever where they begin several in
    different orders, which happens on a busy machine.
    """
    flags = (
        QUICK_FLAGS,
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    )
    return {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def environment(**variables: str) -> dict[str, str]:
    """The environment of a subprocess, set up as conftest.py sets up this one."""
    return os.environ | {
        "XLA_FLAGS": QUICK_FLAGS,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        **variables,
    }


def json_rows(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file, strictly read."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
