"""Faults of the training data: batches whose loss is not finite."""

from __future__ import annotations

from benchmarks.faults.sandbox import STEPS
from benchmarks.faults.trial import Fault, Trial, require
from plt_jax.runs.metrics_file import read_metrics

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
"""Python that gives the loss weights of some batches a value that is not finite."""


def bad_batches(count: int) -> Fault:
    """A fault: so many bad batches in a row, in a run that is also killed and resumed.

    The expected result is that of a run which meets the same batches and is not killed.
    """

    def fault(trial: Trial) -> str:
        first = trial.draw.randint(6, STEPS - 12)
        value = trial.draw.choice(["np.nan", "np.inf"])
        script = SPOIL.format(batches=set(range(first, first + count)), value=value)
        guard = {"patience": 4}
        whole, killed = (
            trial.sandbox.config(f"{trial.name}-{name}", guard=guard)
            for name in ("whole", "killed")
        )
        ended = trial.sandbox.start(whole, script=script).wait()
        require(ended.code == 0, f"exit code {ended.code}: {ended.error[-300:]}")
        rows = read_metrics(whole.parent / "run")
        skipped = sum(row.get("skipped", 0) for row in rows)
        back = [row for row in rows if "rolled_back_from" in row]
        # After a rollback the metrics no longer hold the steps that were skipped before it.
        require(
            skipped == count or (bool(back) and skipped < count), f"{skipped} steps were skipped"
        )
        require(bool(back) == (count > 5), f"{len(back)} rollbacks")
        process = trial.sandbox.start(killed, script=script)
        process.wait_for_step(trial.draw.randint(first, STEPS - 2))
        process.kill()
        ended = trial.sandbox.start(killed, script=script).wait()
        require(ended.code == 0, f"exit code {ended.code}: {ended.error[-300:]}")
        one, other = trial.sandbox.result(whole), trial.sandbox.result(killed)
        require(one.parameters == other.parameters, "the parameters differ once it is killed")
        done = "gone back from, passed over" if back else "skipped, counted"
        return f"{count} batches of {value[3:]} from step {first + 1}: {done}; killed, bit for bit"

    return fault
