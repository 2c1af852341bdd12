"""The figures of a run's report that show its training: losses, norms, speed, wall time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plt_jax.reports.html import BLUE, GREEN, GREY, ORANGE, WIDTH, Drawn
from plt_jax.reports.plotting import (
    FEW,
    draw_curve,
    label_steps,
    legend_beside,
    mark_events,
    new_figure,
    scale_by_span,
    short,
)
from plt_jax.reports.run_history import History
from plt_jax.reports.series import Row, Series, series, thin
from plt_jax.reports.wall_time import CLOCK, PHASES, STEPS, start_time

MANY = 100
"""Most points that are marked with dots."""
SPEEDS = {
    "tokens_per_second": ("tokens per second", 1),
    "model_tflops_per_second": ("model TFLOP/s", 1),
    "mfu": ("MFU, percent", 100),
}
"""Titles of the measures of speed, and the factor by which each is multiplied."""


def draw_losses(history: History) -> Drawn | None:
    training, validation = series(history.rows, "loss"), series(history.rows, "validation_loss")
    if training is None and validation is None:
        return None
    first = min(one.steps_R[0] for one in (training, validation) if one is not None)
    last = max(one.steps_R[-1] for one in (training, validation) if one is not None)
    later = first + (last - first) / 4
    recent = np.array([]) if training is None else _values_from(training, later)
    several = np.isfinite(recent).sum() >= FEW
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    for axes in panels:
        if training is not None:
            draw_curve(axes, training, "training, logged", "training, smoothed")
        if validation is not None:
            form = "o-" if len(validation.steps_R) <= MANY else "-"
            axes.plot(*thin(validation), form, color=ORANGE, markersize=3.5, label="validation")
        mark_events(axes, history)
        label_steps(axes)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend()
    if several:
        seen = recent
        if validation is not None:
            seen = np.concatenate([seen, _values_from(validation, later)])
        # The limits leave out single spikes, which the first panel shows.
        low, high = np.nanpercentile(seen, [0.2, 99.8])
        room = 0.05 * (high - low) or 0.1
        panels[1].set(xlim=(later, last + (last - later) / 50), ylim=(low - room, high + room))
        panels[1].set_title("the last three quarters")
    return Drawn(
        "Losses",
        "Loss on the training batches, each point of one step, and on held-out text (validation). "
        "Bad signs: spikes from which the loss does not recover, a curve that turns upwards, "
        "validation loss that rises while training loss falls (overfitting).",
        figure,
    )


def _values_from(one: Series, step: float) -> np.ndarray:
    """The values of a series from a step on."""
    return one.values_R[one.steps_R >= step]


def draw_learning_rate(history: History) -> Drawn | None:
    rate = series(history.rows, "learning_rate")
    if rate is None:
        return None
    figure, axes = new_figure(1.9)
    axes.plot(*thin(rate), color=BLUE)
    axes.set_ylabel("learning rate")
    axes.set_ylim(0, 1.1 * np.nanmax(rate.values_R) or None)
    label_steps(axes)
    return Drawn(
        "Learning rate",
        f"The schedule is {history.config.optimizer.schedule} with warmup, and its peak is "
        f"{history.config.optimizer.learning_rate:g}. Bad sign: jumps. They appear where "
        "training.steps was changed during the run.",
        figure,
    )


def draw_gradient_norm(history: History) -> Drawn | None:
    norm = series(history.rows, "gradient_norm")
    if norm is None:
        return None
    figure, axes = new_figure(3.0)
    draw_curve(axes, norm)
    if history.config.optimizer.clip_norm is not None:
        label = f"clipped at {history.config.optimizer.clip_norm:g}"
        axes.axhline(history.config.optimizer.clip_norm, color=GREEN, linestyle="--", label=label)
    skipped = [row["step"] for row in history.rows if row.get("skipped")]
    if skipped:
        axes.plot(
            *(skipped, np.full(len(skipped), 0.03)),
            "^",
            color=ORANGE,
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label="skipped steps",
        )
    mark_events(axes, history)
    scale_by_span(axes, norm)
    label_steps(axes)
    axes.set_ylabel("norm")
    legend_beside(axes)
    return Drawn(
        "Gradient norm",
        "Norm of the gradient of all parameters together, before clipping. A triangle marks a row "
        "whose steps include skipped ones. Bad signs: a norm that keeps growing, spikes that "
        "become more frequent, steps that are skipped repeatedly.",
        figure,
    )


def draw_speed(history: History) -> Drawn | None:
    shown = {}
    for name, (title, unit) in SPEEDS.items():
        one = series([row for row in history.rows if row.get(name)], name)
        if one is not None:
            shown[title] = Series(one.steps_R, one.values_R * unit)
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, one) in zip(panels, shown.items(), strict=True):
        median = np.nanmedian(one.values_R)
        axes.plot(*thin(one), color=BLUE, linewidth=0.8)
        axes.axhline(median, color=ORANGE, linestyle="--", zorder=1.8)
        axes.set_title(f"{title} (median {short(median)})")
        # A moment of twice the usual speed is an error of the clock, not a fast machine.
        axes.set_ylim(0, 1.1 * min(np.nanmax(one.values_R), 2 * median))
        axes.yaxis.set_major_formatter("{x:,g}")
        mark_events(axes, history)
        label_steps(axes, ticks=4)
    return Drawn(
        "Speed",
        "Speed of the training steps on all devices together, without pauses. Model FLOPs leave "
        "out what is recomputed to save memory. Bad signs: a speed that falls, or that changes "
        "with a restart.",
        figure,
    )


def draw_wall_time(history: History) -> Drawn | None:
    if not history.spent:
        return None
    timed = [row for row in history.rows if row.get("time") is not None]
    several = any(row[CLOCK] for row in timed)
    count = max(len(history.spent), 5)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * count), layout="constrained")
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    unit = _unit(sum(history.spent.values()))
    _draw_phases(panels[0], history.spent, *unit)
    if several:
        _draw_progress(panels[1], timed, *unit)
    return Drawn(
        "Where the wall time went",
        "The wall time from the beginning of the first start to the newest row. Every start counts "
        "its seconds by phase from 0; the seconds of its last row are added up here, and a new "
        "start is recognised by seconds that fall. The time between the last row of a start and "
        "the beginning of the next start counts as between starts: it holds a last save, "
        "standstill, and the steps that were lost when the run stopped. Steps that a rollback "
        "undid are counted separately; all steps around a rollback are taken to be equally long. "
        "Bad signs: more than a few percent for anything but training steps, and flat stretches "
        "in the curve.",
        figure,
    )


def _draw_phases(axes: Axes, spent: Mapping[str, float], size: float, unit: str) -> None:
    """Draws a bar for the seconds of each phase, in a unit of `size` seconds."""
    names = [name for name in (*PHASES, *(spent.keys() - PHASES)) if name in spent]
    seconds, total = [spent[name] for name in names], sum(spent.values())
    bars = axes.barh(
        [PHASES.get(name, name) for name in names],
        np.divide(seconds, size),
        color=[GREEN if name == STEPS else GREY for name in names],
    )
    axes.bar_label(bars, [f"{one / total:.1%}" for one in seconds], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"wall time ({unit})")


def _draw_progress(axes: Axes, timed: Sequence[Row], size: float, unit: str) -> None:
    """Draws the step over the time since the first start, in a unit of `size` seconds."""
    steps = np.array([row["step"] for row in timed])
    start = start_time(next(row for row in timed if row[CLOCK]))
    passed = np.array([row["time"] for row in timed]) - start
    chosen = np.unique(np.linspace(0, len(timed) - 1, 1000).astype(int))
    axes.plot(passed[chosen] / size, steps[chosen], color=BLUE)
    axes.set(xlabel=f"time since the first start ({unit})", ylabel="step")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _unit(seconds: float) -> tuple[float, str]:
    """The length in seconds and the name of the unit in which to show a time."""
    if seconds >= 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 120 else (1.0, "seconds")
