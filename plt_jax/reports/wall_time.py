"""Where the wall time of a run went: its starts, and the seconds that each phase took.

A row of metrics holds the seconds that its start had spent in each phase by then.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from plt_jax.reports.series import Row

SECONDS = "seconds/"
"""Prefix of the names of a row's seconds by phase."""
CLOCK = "clock"
"""Name under which `read_clocks` collects a row's seconds by phase."""
ROLLBACK = "rolled_back_from"
"""Name in a row that records a rollback: the step from which training went back."""

EVALUATION, STEPS = "evaluation", "steps"
"""Two of the phases that a run measures."""
UNDONE, BETWEEN = "undone", "between"
"""Two phases that are computed here: steps that rollbacks undid, and time between two starts."""
PHASES = {
    STEPS: "training steps",
    "data": "waiting for data",
    EVALUATION: "evaluation",
    "saving": "saving checkpoints",
    "compiling": "compilation",
    "profiling": "writing profiles",
    "starting": "startup and everything else",
    UNDONE: "steps undone by rollbacks",
    BETWEEN: "between starts, with lost steps",
}
"""Labels of the phases, in the order in which they are shown."""


def read_clocks(rows: Sequence[Row]) -> None:
    """Adds CLOCK to each row: the seconds by phase since its start, or an empty dict."""
    for row in rows:
        row[CLOCK] = {
            name.removeprefix(SECONDS): seconds
            for name, seconds in row.items()
            if name.startswith(SECONDS) and seconds is not None
        }


def split_starts(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each start of the run; one list of all rows if no row has a clock."""
    starts: list[list[Row]] = [[]]
    clocked = None  # index of the newest row with a clock, among the rows of its start
    for row in rows:
        if row[CLOCK]:
            if clocked is not None and restarted(starts[-1][clocked], row):
                starts.append(_take_rows_after(starts[-1], clocked, start_time(row)))
            clocked = len(starts[-1])
        starts[-1].append(row)
    return starts


def _take_rows_after(start: list[Row], clocked: int, moment: float) -> list[Row]:
    """Removes and returns the last rows of a start that have no clock and a later time than
    `moment`."""
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
    """Whether a row belongs to a later start than the row before it; both have clocks.

    Every start counts its seconds from 0. In a new start they are lower than before or, if its
    first row came late, fewer than the time that has passed since the row before.
    """
    old, new = before[CLOCK], row[CLOCK]
    if any(new.get(phase, 0.0) < seconds for phase, seconds in old.items()):
        return True
    passed = row.get("time", math.nan) - before.get("time", math.nan)
    # Within a start this difference equals the old seconds; in a later start it is at most 0.
    return sum(new.values()) - passed < sum(old.values()) / 2


def start_time(row: Row) -> float:
    """Unix time at which the start of a row with a clock began; nan if the row has no time."""
    return row.get("time", math.nan) - sum(row[CLOCK].values())


def time_spent(starts: Sequence[list[Row]]) -> dict[str, float]:
    """Seconds of the run's wall time by phase, UNDONE and BETWEEN included; empty without clocks.

    Their sum is the time from the beginning of the first start to the newest row. The time after
    the last row of a start counts as BETWEEN: steps that were lost when it was stopped, and its
    last save. It is unknown if rows have no times.
    """
    spent: dict[str, float] = defaultdict(float)
    for start in starts:
        for phase, seconds in _spent_in(start).items():
            spent[phase] += seconds
    for earlier, later in pairwise(starts):
        gap = start_time(next(row for row in later if row[CLOCK])) - _last_time(earlier)
        spent[BETWEEN] += max(gap, 0.0) if math.isfinite(gap) else 0.0
    return {phase: seconds for phase, seconds in spent.items() if seconds > 0}


def _last_time(start: list[Row]) -> float:
    return max((row["time"] for row in start if "time" in row), default=math.nan)


def _spent_in(start: list[Row]) -> dict[str, float]:
    """Seconds by phase up to the last row of a start."""
    clocked = [index for index, row in enumerate(start) if row[CLOCK]]
    if not clocked:
        return {}
    spent: dict[str, float] = defaultdict(float, start[clocked[-1]][CLOCK])
    undone = _undone_seconds(start)
    spent[STEPS] -= undone
    spent[UNDONE] += undone
    # A row after the last clock says what the time before it was spent on.
    for before, row in pairwise(start[clocked[-1] :]):
        passed = row.get("time", math.nan) - before.get("time", math.nan)
        if passed > 0:
            spent[UNDONE if ROLLBACK in row else EVALUATION] += passed
    return spent


def _undone_seconds(start: list[Row]) -> float:
    """Seconds that a start spent on steps which rollbacks undid.

    All steps between the two rows around a rollback are taken to be equally long.
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
