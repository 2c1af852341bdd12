"""Series of metrics by step, and shorter series for drawing.

Array axes: R, rows of metrics; C, groups of consecutive rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from plt_jax.errors import InputError
from plt_jax.runs.names import METRICS

Row = dict[str, Any]
"""One row of metrics.jsonl."""

POINTS = 1500
"""Points of a drawn curve."""
GROUPS = 240
"""Columns of a drawn map."""


class Series(NamedTuple):
    """The values of one metric, from the rows that have it."""

    steps_R: np.ndarray
    """The step of each row, int [R], ascending."""
    values_R: np.ndarray
    """The values, float64 [R, ...]; nan where a value was not finite."""


class Means(NamedTuple):
    """The means of a series over groups of consecutive rows."""

    edges: np.ndarray
    """The steps at which the groups begin, and the step at which the last one ends, [C + 1]."""
    values_C: np.ndarray
    """The means, float64 [C, ...]; nan where a group has no finite value."""


def series(rows: Sequence[Row], name: str) -> Series | None:
    """The values of one metric; None if no row has a finite value.

    Raises:
      InputError: the values are not numbers, or differ in shape.
    """
    found = [(row["step"], row[name]) for row in rows if name in row]
    try:
        values_R = np.array([value for _, value in found], float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} in {METRICS} has values that are not numbers of one shape: {error}"
        ) from error
    values_R[~np.isfinite(values_R)] = np.nan
    if np.isnan(values_R).all():
        return None
    return Series(np.array([step for step, _ in found]), values_R)


def thin(full: Series, points: int = POINTS) -> Series:
    """A curve of about `points` points: the lowest and the highest value of every group of rows, so
    that every spike stays visible."""
    count = len(full.steps_R)
    if count <= points:
        return full
    kept = {0, count - 1}
    for first, end in pairwise(np.linspace(0, count, points // 2 + 1).astype(int).tolist()):
        values = full.values_R[first:end]
        if np.isnan(values).all():
            kept.add(first)  # keeps the gap in the curve
        else:
            kept |= {first + int(np.nanargmin(values)), first + int(np.nanargmax(values))}
    chosen = sorted(kept)
    return Series(full.steps_R[chosen], full.values_R[chosen])


def smooth(full: Series, points: int = POINTS // 3, share: float = 0.02) -> Series:
    """A curve of at most `points` points, each the median over the rows around it.

    A median is not moved by a few spikes. It is nan where the window has no finite value.

    Args:
      share: length of the window, as a share of all rows.
    """
    count = len(full.steps_R)
    half = max(round(count * share / 2), 1)
    chosen = np.unique(np.linspace(0, count - 1, min(count, points)).astype(int))
    windows = (full.values_R[max(row - half, 0) : row + half + 1] for row in chosen.tolist())
    finite = (window[np.isfinite(window)] for window in windows)
    values = [np.median(window) if window.size else np.nan for window in finite]
    return Series(full.steps_R[chosen], np.array(values))


def means(full: Series, groups: int = GROUPS) -> Means:
    """The means over at most `groups` groups of about equally many rows."""
    count = len(full.steps_R)
    bounds = np.linspace(0, count, min(count, groups) + 1).astype(int)[:-1]
    finite = np.isfinite(full.values_R)
    sums = np.add.reduceat(np.where(finite, full.values_R, 0.0), bounds)
    counts = np.add.reduceat(finite.astype(int), bounds)
    values_C = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    # A row covers the steps since the row before it.
    before = np.concatenate([[max(2 * full.steps_R[0] - full.steps_R[:2][-1], 0)], full.steps_R])
    edges = np.append(before[bounds], full.steps_R[-1]).astype(float)
    if edges[0] == edges[1]:  # the only row: how many steps it covers is unknown
        edges[0] -= 1
    return Means(edges, values_C)
