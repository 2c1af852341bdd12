"""What a run's rows of metrics come to: series, starts, where the wall time went, what stands out.

Arrays have the axes R, rows; C, stretches of rows in order; L, loops; J, layers.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plt_jax.config import RunConfig
from plt_jax.config.yaml_file import load_resolved
from plt_jax.errors import InputError
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import CONFIG, METRICS

Row = dict[str, Any]

SECONDS, CLOCK = "seconds/", "clock"
"""What the names of a row's seconds by phase begin with; where they are together."""
ROLLBACK = "rolled_back_from"
EVALUATION, STEPS = "evaluation", "steps"
UNDONE, BETWEEN = "undone", "between"
"""Beside a run's own phases: steps that rollbacks undid, and what lies between two starts."""
PHASES = {
    STEPS: "computing steps",
    "data": "waiting for data",
    EVALUATION: "evaluating",
    "saving": "saving",
    "compiling": "compiling",
    "profiling": "writing a profile",
    "starting": "starting, and all else",
    UNDONE: "steps undone by rollbacks",
    BETWEEN: "between starts, with steps lost",
}
"""How phases are called, in the order in which they are shown."""
POINTS = 1500
"""Of a curve, drawn."""
SAMPLED = 8000
"""Rows of which maps are drawn, whose many values take most of the time."""
STRETCHES = 240
"""Of a map's columns, drawn."""
RISEN = 1.02
"""Held-out loss, relative to its best, that is told as a rise."""
LITTLE = 0.9
"""Share of the wall time in steps below which it is told where the rest went."""


class History(NamedTuple):
    """What a run has written down."""

    config: RunConfig
    rows: list[Row]
    """Of metrics, in the order of their steps, each with its seconds by phase as CLOCK."""
    sampled: list[Row]
    """Of those of training at most SAMPLED, evenly spaced."""
    starts: list[list[Row]]
    """All rows, those of each start of the run."""
    spent: dict[str, float]
    """See `time_spent`."""


class Series(NamedTuple):
    """One name's values in the rows that have it."""

    steps_R: np.ndarray
    """Of each row, ascending."""
    values_R: np.ndarray
    """[R, ...]; nan where a number was not finite."""


class Means(NamedTuple):
    """A series' means over stretches of rows."""

    edges: np.ndarray
    """Steps at which the stretches begin, and at which the last ends."""
    values_C: np.ndarray
    """[C, ...]; nan where a stretch has no finite number."""


class Rollback(NamedTuple):
    """Training went back."""

    step: int
    """To which it went, and from which it goes on."""
    undone: int
    """Steps behind it that were computed."""


class Summary(NamedTuple):
    """A run in a few numbers; those that its rows do not tell are None."""

    step: int
    """That it has reached."""
    best: tuple[int, float] | None
    """Step and bits per byte of the best evaluation."""
    last: tuple[int, float] | None
    """Of the newest."""
    tokens_per_second: float | None
    """Median over the rows."""
    mfu: float | None
    """Median over the rows, a share."""
    goodput: float | None
    """Share of the whole run's wall time in steps that count."""
    seconds: float | None
    """Wall time from its first start to its newest row."""
    restarts: int | None
    """Starts after the first that left rows."""
    skipped: int
    """Steps that changed nothing."""
    rollbacks: list[Rollback]


def read_history(directory: Path) -> History:
    """What a run directory holds of its run so far.

    Raises:
      InputError: there are no rows of metrics, or they are not what a run writes.
    """
    config, path = load_resolved(directory / CONFIG), directory / METRICS
    try:
        rows = read_metrics(directory)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not rows:
        raise InputError(f"{path} holds no row yet; a run writes them as it trains")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"line {number} of {path} is no row of metrics: it has no step")
    return make_history(config, rows)


def make_history(config: RunConfig, rows: list[Row]) -> History:
    """What rows of metrics tell; each gets its CLOCK."""
    for row in rows:
        row[CLOCK] = _clock(row)
    training = [row for row in rows if "loss" in row]
    starts = split_starts(rows)
    every = math.ceil(len(training) / SAMPLED) or 1
    return History(config, rows, training[::every], starts, time_spent(starts))


def series(rows: Sequence[Row], name: str) -> Series | None:
    """The values of a name; None where no row has a finite one.

    Raises:
      InputError: they are not numbers, or not of one shape.
    """
    found = [(row["step"], row[name]) for row in rows if name in row]
    try:
        values_R = np.array([value for _, value in found], float)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} in {METRICS} is not numbers of one shape: {error}") from error
    values_R[~np.isfinite(values_R)] = np.nan
    if np.isnan(values_R).all():
        return None
    return Series(np.array([step for step, _ in found]), values_R)


def thin(full: Series, points: int = POINTS) -> Series:
    """A curve of about `points` points: the lowest and the highest of every stretch, so that no
    spike is lost."""
    count = len(full.steps_R)
    if count <= points:
        return full
    kept = {0, count - 1}
    for first, end in pairwise(np.linspace(0, count, points // 2 + 1).astype(int).tolist()):
        values = full.values_R[first:end]
        if np.isnan(values).all():
            kept.add(first)  # where the curve has a gap
        else:
            kept |= {first + int(np.nanargmin(values)), first + int(np.nanargmax(values))}
    chosen = sorted(kept)
    return Series(full.steps_R[chosen], full.values_R[chosen])


def smooth(full: Series, points: int = POINTS // 3, share: float = 0.02) -> Series:
    """A curve of at most `points` points: the median over a window of this share of the rows around
    each, which a few spikes do not move; nan where nothing there is finite."""
    count = len(full.steps_R)
    half = max(round(count * share / 2), 1)
    chosen = np.unique(np.linspace(0, count - 1, min(count, points)).astype(int))
    windows = (full.values_R[max(row - half, 0) : row + half + 1] for row in chosen.tolist())
    finite = (window[np.isfinite(window)] for window in windows)
    values = [np.median(window) if window.size else np.nan for window in finite]
    return Series(full.steps_R[chosen], np.array(values))


def means(full: Series, stretches: int = STRETCHES) -> Means:
    """The means over at most `stretches` stretches of about as many rows each."""
    count = len(full.steps_R)
    bounds = np.linspace(0, count, min(count, stretches) + 1).astype(int)[:-1]
    finite = np.isfinite(full.values_R)
    sums = np.add.reduceat(np.where(finite, full.values_R, 0.0), bounds)
    counts = np.add.reduceat(finite.astype(int), bounds)
    values_C = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    # A row tells of the steps since the row before it.
    before = np.concatenate([[max(2 * full.steps_R[0] - full.steps_R[:2][-1], 0)], full.steps_R])
    edges = np.append(before[bounds], full.steps_R[-1]).astype(float)
    if edges[0] == edges[1]:  # of one row nobody knows how many
        edges[0] -= 1
    return Means(edges, values_C)


def split_starts(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each start of the run; all in one list where no row has a clock."""
    starts: list[list[Row]] = [[]]
    clocked = None  # where the newest row with a clock is among its start's
    for row in rows:
        if row[CLOCK]:
            if clocked is not None and restarted(starts[-1][clocked], row):
                starts.append(_after(starts[-1], clocked, began(row)))
            clocked = len(starts[-1])
        starts[-1].append(row)
    return starts


def _after(start: list[Row], clocked: int, moment: float) -> list[Row]:
    """Takes from a start the last rows, which have no clock and were written after a moment."""
    first = next(
        (
            index
            for index in range(clocked + 1, len(start))
            if start[index].get("time", -math.inf) > moment
        ),
        len(start),
    )
    taken = start[first:]
    del start[first:]
    return taken


def restarted(before: Row, row: Row) -> bool:
    """Whether a row is of a later start than the one before it, both with clocks.

    Every start counts its seconds from 0: they fall or, where it took long to its first row, are
    fewer than have gone by since the row before.
    """
    old, new = before[CLOCK], row[CLOCK]
    if any(new.get(phase, 0.0) < seconds for phase, seconds in old.items()):
        return True
    passed = row.get("time", math.nan) - before.get("time", math.nan)
    # In the same start the difference is all of the old seconds, and in a later one at most 0.
    return sum(new.values()) - passed < sum(old.values()) / 2


def _clock(row: Row) -> dict[str, float]:
    """A row's seconds by phase, since its start; empty where it has none."""
    return {
        name.removeprefix(SECONDS): seconds
        for name, seconds in row.items()
        if name.startswith(SECONDS) and seconds is not None
    }


def began(row: Row) -> float:
    """When the start of a row with a clock began, in Unix seconds; nan where it has no time."""
    return row.get("time", math.nan) - sum(row[CLOCK].values())


def time_spent(starts: Sequence[list[Row]]) -> dict[str, float]:
    """Seconds of the run's wall time by phase, and UNDONE and BETWEEN; empty without clocks.

    In all they are the time from the beginning of its first start to its newest row. What a start
    did after its last row is BETWEEN: the steps that a kill lost, and its last save. Without times
    nothing is known of that.
    """
    spent: Counter[str] = Counter()
    for start in starts:
        spent.update(_spent_in(start))
    for earlier, later in pairwise(starts):
        gap = began(next(row for row in later if row[CLOCK])) - _ended(earlier)
        spent[BETWEEN] += max(gap, 0.0) if math.isfinite(gap) else 0.0
    return {phase: seconds for phase, seconds in spent.items() if seconds > 0}


def _ended(start: list[Row]) -> float:
    return max((row["time"] for row in start if "time" in row), default=math.nan)


def _spent_in(start: list[Row]) -> dict[str, float]:
    """Seconds by phase up to a start's last row."""
    clocked = [index for index, row in enumerate(start) if row[CLOCK]]
    if not clocked:
        return {}
    spent = Counter(start[clocked[-1]][CLOCK])
    undone = _undone_seconds(start)
    spent[STEPS] -= undone
    spent[UNDONE] += undone
    # The rows behind the last clock tell what was done up to them.
    for before, row in pairwise(start[clocked[-1] :]):
        passed = row.get("time", math.nan) - before.get("time", math.nan)
        if passed > 0:
            spent[UNDONE if ROLLBACK in row else EVALUATION] += passed
    return spent


def _undone_seconds(start: list[Row]) -> float:
    """Of a start's seconds in steps, those of steps that rollbacks undid.

    Between the rows around a rollback every step, undone or not, is taken to be as long.
    """
    total, before, at, undone = 0.0, 0.0, start[0]["step"], 0
    for row in start:
        if ROLLBACK in row:
            undone += row[ROLLBACK] - row["step"]
        elif STEPS in (seconds := row[CLOCK]):
            computed = undone + row["step"] - at
            if undone > 0 and computed > 0:
                total += (seconds[STEPS] - before) * undone / computed
            before, at, undone = seconds[STEPS], row["step"], 0
    return total


def rollbacks(rows: Sequence[Row]) -> list[Rollback]:
    """In order."""
    return [Rollback(row["step"], row[ROLLBACK] - row["step"]) for row in rows if row.get(ROLLBACK)]


def restart_steps(starts: Sequence[list[Row]]) -> list[int]:
    """The last step of each start but the newest of which a row is left."""
    return [start[-1]["step"] for start in starts[:-1]]


def summarize(history: History) -> Summary:
    """A run in a few numbers."""
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
    """Over the rows with a positive value: right after a rollback there are no steps to measure."""
    values = [row[name] for row in rows if row.get(name)]
    return statistics.median(values) if values else None


def what_stands_out(history: History, summary: Summary) -> list[str]:
    """What a person should look into, a sentence each."""
    return [
        *_losses_out_of_order(history.rows),
        *_steps_out_of_order(history.config, summary),
        *_time_out_of_order(summary, history.spent),
    ]


def _losses_out_of_order(rows: Sequence[Row]) -> list[str]:
    said = []
    training = [row for row in rows if "loss" in row]
    if training and training[-1]["loss"] is None:
        said.append(f"The newest loss, at step {training[-1]['step']:,}, is not a finite number.")
    held_out = [
        (row["step"], row["validation_loss"])
        for row in rows
        if row.get("validation_loss") is not None
    ]
    if held_out:
        (step, best), (_, last) = min(held_out, key=lambda one: one[1]), held_out[-1]
        if last > RISEN * best:
            said.append(
                f"Held-out loss was best at step {step:,}, {best:.4f}, and is {last:.4f} now."
            )
    dropped = max((row.get("expert_dropped") or 0.0 for row in rows), default=0.0)
    if dropped > 0:
        said.append(f"Up to {dropped:.2%} of the choices of experts were dropped; none should be.")
    return said


def _steps_out_of_order(config: RunConfig, summary: Summary) -> list[str]:
    said = []
    if summary.skipped:
        said.append(
            f"{summary.skipped:,} of {summary.step:,} steps changed nothing: their loss or "
            "gradient was not finite, or above the limits of the guard."
        )
    if summary.rollbacks:
        undone = sum(one.undone for one in summary.rollbacks)
        said.append(
            f"Rollbacks: {len(summary.rollbacks)}, over {undone:,} steps in all, each after "
            f"{config.guard.patience} skipped in a row."
        )
    return said


def _time_out_of_order(summary: Summary, spent: dict[str, float]) -> list[str]:
    if summary.goodput is None or summary.goodput >= LITTLE:
        return []
    phase, seconds = max(
        ((phase, seconds) for phase, seconds in spent.items() if phase != STEPS),
        key=lambda one: one[1],
    )
    return [
        f"{summary.goodput:.0%} of the wall time went into steps that count, and "
        f"{seconds / summary.seconds:.0%} into: {PHASES.get(phase, phase)}."
    ]
