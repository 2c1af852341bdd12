"""Where training starts: with fresh parameters, with another run's, or at its own checkpoint."""

from __future__ import annotations

import itertools
import json
from typing import Any, NamedTuple

import grain

from plt_jax.checkpoint.damage import (
    describe_damage,
    find_shared_damage,
    refuse_damaged,
    set_aside,
)
from plt_jax.checkpoint.params import load_params
from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import Checkpoints
from plt_jax.config import RunConfig
from plt_jax.distributed import processes
from plt_jax.errors import InputError, naming
from plt_jax.runs.directory import find_checkpoint
from plt_jax.runs.names import CHECKPOINTS
from plt_jax.runs.quantized import is_quantized_checkpoint
from plt_jax.training.guard import Guard
from plt_jax.training.program import TrainProgram
from plt_jax.training.step import TrainState

GUARD = "guard"
"""The name of the guard's state in a checkpoint, beside the state of the data."""
_numbers = itertools.count()
"""Numbers of the damage reports that process 0 gathers, each used once."""


class StartPoint(NamedTuple):
    """What training goes on from, apart from its data."""

    state: TrainState
    guard: Guard
    """It knows the steps before."""


def check_start_from(config: RunConfig) -> None:
    """Checks the checkpoint that a fresh run starts from, if it names one.

    Raises:
      InputError: `start_from` leads to no checkpoint, to a damaged or quantized one, or to one
        without a tokenizer.
    """
    if config.start_from is None or list_steps(config.directory / CHECKPOINTS):
        return
    with naming("start_from"):
        found = find_checkpoint(config.start_from)
        if is_quantized_checkpoint(found.directory / CHECKPOINTS, found.step):
            raise InputError(
                f"the weights of {config.start_from} were rounded to eight bits, for decoding; "
                "start from the run that it was made of"
            )
    if config.tokenizer.path is None:
        raise InputError(
            f"start_from {config.start_from} has no tokenizer, so its embeddings' text is not "
            "known; give its tokenizer.json as tokenizer.path"
        )
    if config.checkpoint.verify:
        with naming("start_from"):
            refuse_damaged(found.directory / CHECKPOINTS, found.step, ["params"])


def load_start_params(config: RunConfig, abstract: TrainState) -> Any | None:
    """The parameters of `start_from`; None if the run resumes, or begins with fresh ones.

    Raises:
      InputError: the parameters cannot be read, or have other shapes.
    """
    if config.start_from is None or list_steps(config.directory / CHECKPOINTS):
        return None
    with naming("start_from"):
        directory, _, step = find_checkpoint(config.start_from)
        print(f"starting from {directory}, step {step}", flush=True)
        return load_params(directory / CHECKPOINTS, step, abstract.params)


def choose_checkpoint(config: RunConfig) -> int | None:
    """The step of the checkpoint that a run resumes; None if it has no checkpoint.

    It is the newest, or with `checkpoint.skip_damaged` the newest that is not damaged. All
    processes must call it together.

    Raises:
      InputError: the newest is damaged in this process's part of its files, or all are damaged.
    """
    folder = config.directory / CHECKPOINTS
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
    """Renames the damaged checkpoints after `step`, so that their steps can be saved again.

    Only process 0 may call it.

    Args:
      step: what `choose_checkpoint` has returned.
    """
    folder = config.directory / CHECKPOINTS
    for skipped in list_steps(folder):
        if step is not None and skipped > step:
            moved = set_aside(folder / str(skipped))
            print(f"moved aside: {moved}; delete it when you have looked at it", flush=True)


def start_or_resume(
    program: TrainProgram,
    checkpoints: Checkpoints,
    step: int | None,
    batches: grain.DatasetIterator,
    params: Any | None,
) -> StartPoint:
    """A fresh state, or that of a checkpoint.

    Args:
      step: the checkpoint to resume; None for a fresh state.
      batches: the training data, which is moved to the batch after the checkpoint.
      params: the parameters of a fresh state; None to initialise them.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    config = program.config
    if step is None:
        state = program.init_state() if params is None else program.start_state(params)
        return StartPoint(state, Guard(config.guard))
    print(f"resuming at step {step} of {config.training.steps}", flush=True)
    start, data = restore(program, checkpoints, step)
    batches.set_state(data)
    return start


def restore(
    program: TrainProgram, checkpoints: Checkpoints, step: int
) -> tuple[StartPoint, dict[str, Any]]:
    """The state in a checkpoint, and the state that the iterator of its batches had.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    abstract = program.abstract_state
    optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
    params, optimizer, data = checkpoints.restore(step, abstract.params, optimizer)
    guard = Guard(program.config.guard, data.pop(GUARD, None))  # earlier versions saved none
    return StartPoint(TrainState(optimizer["step"], params, optimizer["opt_state"]), guard), data
