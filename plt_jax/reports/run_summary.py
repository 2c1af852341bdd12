"""A run in a few numbers, and what a person should look at."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from plt_jax.config import RunConfig
from plt_jax.reports.run_history import History, Rollback, rollbacks
from plt_jax.reports.series import Row
from plt_jax.reports.wall_time import PHASES, STEPS

RISEN = 1.02
"""Ratio of the newest validation loss to the best one from which a rise is reported."""
LOW_GOODPUT = 0.9
"""Goodput below which the report says where the rest of the time went."""


class Summary(NamedTuple):
    """A run in a few numbers; a number is None if the rows do not hold it."""

    step: int
    """The newest step."""
    best: tuple[int, float] | None
    """Step and bits per byte of the best evaluation."""
    last: tuple[int, float] | None
    """Step and bits per byte of the newest evaluation."""
    tokens_per_second: float | None
    """Median over the rows."""
    mfu: float | None
    """Median over the rows, a share."""
    goodput: float | None
    """Share of the wall time that went into steps which were not undone."""
    seconds: float | None
    """Wall time from the first start to the newest row."""
    restarts: int | None
    """The number of starts after the first, counting those that wrote rows."""
    skipped: int
    """The number of steps that did not change the parameters."""
    rollbacks: list[Rollback]


def summarize(history: History) -> Summary:
    """The summary of a run's history."""
    rows, spent = history.rows, history.spent
    total = sum(spent.values())
    evaluations = [
        (row["step"], row["bits_per_byte"]) for row in rows if row.get("bits_per_byte") is not None
    ]
    return Summary(
        step=max(row["step"] for row in rows),
        best=min(evaluations, key=lambda one: one[1], default=None),
        last=evaluations[-1] if evaluations else None,
        tokens_per_second=_median(rows, "tokens_per_second"),
        mfu=_median(rows, "mfu"),
        goodput=spent.get(STEPS, 0.0) / total if total else None,
        seconds=total or None,
        restarts=len(history.starts) - 1 if spent else None,
        skipped=round(sum(row.get("skipped") or 0 for row in rows)),
        rollbacks=rollbacks(rows),
    )


def _median(rows: Sequence[Row], name: str) -> float | None:
    """The median of a metric over the rows where it is positive; right after a rollback it is 0."""
    values = [row[name] for row in rows if row.get(name)]
    return statistics.median(values) if values else None


def what_stands_out(history: History, summary: Summary) -> list[str]:
    """Findings that a person should look at, one sentence each."""
    return [
        *_about_losses(history.rows),
        *_about_steps(history.config, summary),
        *_about_time(summary, history.spent),
    ]


def _about_losses(rows: Sequence[Row]) -> list[str]:
    findings = []
    training = [row for row in rows if "loss" in row]
    if training and training[-1]["loss"] is None:
        findings.append(f"The newest loss, at step {training[-1]['step']:,}, is not finite.")
    evaluations = [
        (row["step"], row["validation_loss"])
        for row in rows
        if row.get("validation_loss") is not None
    ]
    if evaluations:
        (step, best), (_, last) = min(evaluations, key=lambda one: one[1]), evaluations[-1]
        if last > RISEN * best:
            findings.append(
                f"Validation loss was lowest at step {step:,}, {best:.4f}; it is {last:.4f} now."
            )
    dropped = max((row.get("expert_dropped") or 0.0 for row in rows), default=0.0)
    if dropped > 0:
        findings.append(f"Up to {dropped:.2%} of the expert choices were dropped; none should be.")
    return findings


def _about_steps(config: RunConfig, summary: Summary) -> list[str]:
    findings = []
    if summary.skipped:
        findings.append(
            f"{summary.skipped:,} of {summary.step:,} steps were skipped: their loss or "
            "gradient was not finite, or above the guard's limits."
        )
    if summary.rollbacks:
        undone = sum(one.undone for one in summary.rollbacks)
        findings.append(
            f"Rollbacks: {len(summary.rollbacks)}. They undid {undone:,} steps, and each followed "
            f"{config.guard.patience} skipped steps in a row."
        )
    return findings


def _about_time(summary: Summary, spent: dict[str, float]) -> list[str]:
    if summary.goodput is None or summary.seconds is None or summary.goodput >= LOW_GOODPUT:
        return []
    phase, seconds = max(
        ((phase, seconds) for phase, seconds in spent.items() if phase != STEPS),
        key=lambda one: one[1],
    )
    return [
        f"{summary.goodput:.0%} of the wall time went into training steps; the largest "
        f"other part, {seconds / summary.seconds:.0%}, was: {PHASES.get(phase, phase)}."
    ]
