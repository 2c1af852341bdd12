"""Going back to the newest checkpoint where too many steps in a row were skipped."""

from __future__ import annotations

import json

import jax

from plt_jax.checkpoint.damage import refuse_damaged
from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import Checkpoints
from plt_jax.distributed import processes
from plt_jax.errors import FailedError
from plt_jax.runs.names import CHECKPOINTS
from plt_jax.training.guard import LAG, Guard, describe_skip
from plt_jax.training.setup import RunSetup
from plt_jax.training.start import StartPoint, restore


def roll_back(
    setup: RunSetup,
    checkpoints: Checkpoints,
    step: int,
    metrics: dict[str, jax.Array],
    guard: Guard,
    count: int,
) -> StartPoint:
    """The state of the newest checkpoint.

    The data is not moved back, so that training goes on with the batches after those that were
    skipped.

    Args:
      step: the newest step.
      metrics: its metrics.
      guard: the guard that asks for the rollback.
      count: how many rollbacks this start of the run has made, this one included.

    Raises:
      FailedError: there were more than `guard.rollbacks`, or there is no checkpoint.
    """
    config = setup.config
    folder, patience = setup.directory / CHECKPOINTS, config.processes.timeout
    decisive = guard.decisive_step()._asdict()
    problem = describe_skip(metrics | decisive, config.model.first_routed_layer)
    checkpoints.wait()
    processes.barrier("the last checkpoint is complete", patience)
    # Process 0 lists the folder for all: on a shared file system others may see it later.
    steps = json.loads(processes.broadcast(json.dumps(list_steps(folder)), patience))
    if count > config.guard.rollbacks or not steps:
        refusal = "there is no checkpoint to roll back to"
        if steps:
            refusal = f"it was rolled back {count - 1} times (guard.rollbacks)"
        raise FailedError(
            f"{problem} at step {step - LAG}, the last of {config.guard.patience} in a row that "
            f"were skipped (guard.patience), and {refusal}; look at the data, raise "
            "guard.rollbacks, or train on in another run, with a lower learning rate and "
            f"--start_from {setup.directory}"
        )
    if config.checkpoint.verify:
        with processes.fail_together("the checkpoint to roll back to is checked", patience):
            refuse_damaged(folder, steps[-1])
    print(
        f"rolling back from step {step} to {steps[-1]}, and going on with the data after it: "
        f"{problem}",
        flush=True,
    )
    start, _ = restore(setup.program, checkpoints, steps[-1])
    start.guard.forget_skipped()
    return start
