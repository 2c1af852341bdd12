"""Where a run starts: anew, with another run's parameters, or at a checkpoint of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import (
    Checkpoints,
    describe_damage,
    find_shared_damage,
    load_params,
    refuse_damaged,
    set_aside,
)
from plt_jax.config import RunConfig
from plt_jax.distributed import processes
from plt_jax.errors import InputError, naming
from plt_jax.runs.directory import find_checkpoint
from plt_jax.runs.names import CHECKPOINTS
from plt_jax.training.guard import Guard
from plt_jax.training.step import TrainState, init_state, start_state

GUARD = "guard"
"""Where the guard's state lies among that of the data."""
_numbers = itertools.count()
"""Of the times that processes tell the first what damage they found."""


def check_start(config: RunConfig) -> None:
    """Raises InputError where `start_from` leads to no checkpoint, to a damaged one, or to one of
    unknown tokens."""
    if config.start_from is None or list_steps(Path(config.run_dir) / CHECKPOINTS):
        return
    with naming("start_from"):
        found = find_checkpoint(config.start_from)
    if config.tokenizer.path is None:
        raise InputError(
            f"start_from {config.start_from} has no tokenizer, so its embeddings' text is not "
            "known; give its tokenizer.json as tokenizer.path"
        )
    if config.checkpoint.verify:
        with naming("start_from"):
            refuse_damaged(found.directory / CHECKPOINTS, found.step, ["params"])


def start_params(config: RunConfig, abstract: TrainState) -> Any | None:
    """The parameters that a fresh run starts from; None if it draws its own, or resumes.

    Raises:
      InputError: they cannot be read, or have other shapes.
    """
    if config.start_from is None or list_steps(Path(config.run_dir) / CHECKPOINTS):
        return None
    with naming("start_from"):
        directory, _, step = find_checkpoint(config.start_from)
        print(f"starting from {directory}, step {step}", flush=True)
        return load_params(directory / CHECKPOINTS, step, abstract.params)


def choose_checkpoint(config: RunConfig) -> int | None:
    """The step at which a run goes on: of its newest checkpoint, or with `checkpoint.skip_damaged`
    of the newest that is not damaged; None if it has none. All processes must call it together.

    Raises:
      InputError: it is damaged in this process's part of its files, or all are.
    """
    folder = Path(config.run_dir) / CHECKPOINTS
    steps = list_steps(folder)
    if not steps or not config.checkpoint.verify:
        return steps[-1] if steps else None
    if not config.checkpoint.skip_damaged:
        advice = "there is none before it; begin again in another --run_dir"
        if steps[:-1]:
            advice = f"--checkpoint.skip_damaged true goes on from one before it ({steps[-2]})"
        refuse_damaged(folder, steps[-1], advice=advice)
        return steps[-1]
    for step in reversed(steps):
        damage = find_shared_damage(folder / str(step))
        key, patience = f"damage/{next(_numbers)}", config.processes.timeout
        gathered = processes.gather(key, json.dumps(damage), patience)
        if not processes.any_process(bool(damage)):
            return step
        damage = [text for texts in gathered for text in json.loads(texts)]
        if processes.is_first():
            print(f"skipping: {describe_damage(folder / str(step), damage)}", flush=True)
    raise InputError(f"all checkpoints in {folder} are damaged; begin again in another --run_dir")


def set_aside_damaged(config: RunConfig, step: int | None) -> None:
    """Renames the checkpoints that `choose_checkpoint` has skipped, so that their steps can be
    saved again; call it in the first process."""
    folder = Path(config.run_dir) / CHECKPOINTS
    for skipped in list_steps(folder):
        if step is not None and skipped > step:
            moved = set_aside(folder / str(skipped))
            print(f"moved aside: {moved}; delete it when you have looked at it", flush=True)


class Start(NamedTuple):
    """What training goes on from, beside its data."""

    state: TrainState
    guard: Guard
    """Knows the steps before."""


def start_or_resume(
    config: RunConfig,
    mesh: Mesh,
    abstract: TrainState,
    saved: Checkpoints,
    step: int | None,
    batches: Iterator,
    params: Any | None,
) -> Start:
    """A fresh state, or a checkpoint's with the batches set to go on behind it.

    Args:
      step: of the checkpoint, if there is one.
      params: what a fresh state starts with; default drawn.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    if step is None and params is None:
        return Start(init_state(config, mesh), Guard(config.guard))
    if step is None:
        return Start(start_state(config, mesh, params), Guard(config.guard))
    print(f"resuming at step {step} of {config.training.steps}", flush=True)
    start, data = restore(config, abstract, saved, step)
    batches.set_state(data)
    return start


def restore(
    config: RunConfig, abstract: TrainState, saved: Checkpoints, step: int
) -> tuple[Start, dict[str, Any]]:
    """What a checkpoint holds, and the state that its batches had.

    Raises:
      InputError: it cannot be read.
    """
    optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
    params, optimizer, data = saved.restore(step, abstract.params, optimizer)
    guard = Guard(config.guard, data.pop(GUARD, None))  # earlier versions saved none
    return Start(TrainState(optimizer["step"], params, optimizer["opt_state"]), guard), data
