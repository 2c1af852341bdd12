"""The metrics of a run, as its report reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plt_jax.config import RunConfig
from plt_jax.config.yaml_file import load_resolved
from plt_jax.errors import InputError
from plt_jax.reports.series import Row
from plt_jax.reports.wall_time import ROLLBACK, read_clocks, split_starts, time_spent
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import CONFIG, METRICS

SAMPLED = 8000
"""Most rows that maps are drawn from; maps have many values per row and are slow to draw."""


class History(NamedTuple):
    """The recorded history of a run."""

    config: RunConfig
    rows: list[Row]
    """All rows of metrics, in the order of their steps, each with its CLOCK."""
    sampled: list[Row]
    """At most SAMPLED of the training rows, evenly spaced."""
    starts: list[list[Row]]
    """All rows, grouped by the start of the run that wrote them."""
    spent: dict[str, float]
    """Seconds of wall time by phase; see `time_spent`."""


class Rollback(NamedTuple):
    """One return of the training to an earlier step."""

    step: int
    """The step to which training went back."""
    undone: int
    """The number of steps that were computed after it and discarded."""


def read_history(directory: Path) -> History:
    """The history of the run in a directory, up to now.

    Raises:
      InputError: there are no rows of metrics, or they are not in the form that a run writes.
    """
    config, path = load_resolved(directory / CONFIG), directory / METRICS
    rows = read_metrics(directory)
    if not rows:
        raise InputError(f"{path} holds no row yet; wait until the run has trained some steps")
    return make_history(config, rows)


def make_history(config: RunConfig, rows: list[Row]) -> History:
    """The history that rows of metrics describe; adds CLOCK to each row."""
    read_clocks(rows)
    training = [row for row in rows if "loss" in row]
    starts = split_starts(rows)
    every = math.ceil(len(training) / SAMPLED) or 1
    return History(config, rows, training[::every], starts, time_spent(starts))


def rollbacks(rows: Sequence[Row]) -> list[Rollback]:
    """The rollbacks that rows record, in order."""
    return [Rollback(row["step"], row[ROLLBACK] - row["step"]) for row in rows if row.get(ROLLBACK)]


def restart_steps(starts: Sequence[list[Row]]) -> list[int]:
    """The last recorded step of each start but the newest."""
    return [start[-1]["step"] for start in starts[:-1]]
