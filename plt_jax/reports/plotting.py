"""Elements that several figures of a run's report share.

Array axes: C, groups of consecutive rows; K, the lines of a map.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from plt_jax.reports.html import BLUE, GREY, PINK, WIDTH
from plt_jax.reports.run_history import History, restart_steps, rollbacks
from plt_jax.reports.series import Series, smooth, thin

FEW = 12
"""Fewest rows for which a curve is also drawn smoothed."""


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure as wide as the page, `height` inches high, with one panel."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def draw_curve(
    axes: Axes,
    full: Series,
    logged: str | None = "as logged",
    smoothed: str = "smoothed",
    color: str = BLUE,
    dash: str = "-",
) -> None:
    """Draws the logged values and, if there are at least FEW, a smoothed curve.

    Args:
      logged, smoothed: labels in the legend.
    """
    if len(full.steps_R) < FEW:
        axes.plot(*full, marker=".", color=color, linestyle=dash, label=logged or smoothed)
        return
    axes.plot(*thin(full), color=color, linewidth=0.8, alpha=0.35, label=logged)
    axes.plot(*smooth(full), color=color, linestyle=dash, label=smoothed)


def draw_map(
    axes: Axes,
    edges: np.ndarray,
    values_CK: np.ndarray,
    norm: Normalize,
    colors: str,
    first: int = 0,
) -> QuadMesh:
    """Draws a map of values: steps from left to right, lines from top to bottom.

    Args:
      edges: steps at which the columns begin, and at which the last one ends, [C + 1].
      values_CK: the values; nan is drawn grey.
      first: number of the topmost line.
    """
    count = values_CK.shape[1]
    axes.set_facecolor("#DDDDDD")  # the colour of nan
    axes.grid(False)
    mesh = axes.pcolormesh(
        *(edges, np.arange(count + 1) + first - 0.5, np.ma.masked_invalid(values_CK.T)),
        norm=norm,
        cmap=colors,
        rasterized=True,
    )
    axes.set_ylim(first + count - 0.5, first - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return mesh


def mark_events(axes: Axes, history: History) -> None:
    """Draws vertical lines at restarts and rollbacks."""
    rollback_steps = [rollback.step for rollback in rollbacks(history.rows)]
    for label, steps, color, dash in (
        ("restart", restart_steps(history.starts), GREY, "dashed"),
        ("rollback", rollback_steps, PINK, "dashdot"),
    ):
        if steps:
            axes.vlines(
                *(sorted(set(steps)), 0, 1),
                transform=axes.get_xaxis_transform(),
                label=label,
                linewidth=1.0,
                zorder=1.5,
                color=color,
                linestyle=dash,
            )


def label_steps(axes: Axes, ticks: int = 7) -> None:
    """Labels the horizontal axis as steps, with about `ticks` ticks."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def scale_by_span(axes: Axes, full: Series) -> None:
    """Sets a logarithmic scale if the values differ by a factor of 10 or more."""
    positive = full.values_R[full.values_R > 0]
    if positive.size and positive.max() >= 10 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def legend_beside(axes: Axes) -> None:
    """Puts the legend to the right of a panel."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def short(number: float) -> str:
    """A number with three digits, or all digits of a larger one, never as a power of ten."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
