"""The figures of a run's report, as sections with SVG; what has no data is left out.

Arrays have the axes of numbers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from plt_jax.reports.html import (
    BLUE,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PINK,
    WIDTH,
    Drawn,
    Section,
    draw_all,
)
from plt_jax.reports.run_numbers import (
    CLOCK,
    PHASES,
    History,
    Row,
    Series,
    began,
    means,
    restart_steps,
    rollbacks,
    series,
    smooth,
    thin,
)

TIMES_OF_MEDIAN = 10.0
"""How far above and below its median a norm's colour reaches."""
FEW, MANY = 12, 100
"""Rows below which a curve has no smoothed one beside it; above which its points have no dots."""


def draw_sections(history: History) -> list[Section]:
    """All there is to draw.

    Raises:
      InputError: a name's values are not numbers, or not of one shape.
    """
    return draw_all(partial(draw, history) for draw in DRAWINGS)


def draw_losses(history: History) -> Drawn | None:
    training, held_out = series(history.rows, "loss"), series(history.rows, "validation_loss")
    if training is None and held_out is None:
        return None
    first = min(one.steps_R[0] for one in (training, held_out) if one is not None)
    last = max(one.steps_R[-1] for one in (training, held_out) if one is not None)
    later = first + (last - first) / 4
    several = training is not None and np.isfinite(_from(training, later)).sum() >= FEW
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    for axes in panels:
        if training is not None:
            _draw_curve(axes, training, "training, as logged", "training, smoothed")
        if held_out is not None:
            form = "o-" if len(held_out.steps_R) <= MANY else "-"
            axes.plot(*thin(held_out), form, color=ORANGE, markersize=3.5, label="held-out text")
        _mark_events(axes, history)
        _count_steps(axes)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend()
    if several:
        seen = _from(training, later)
        if held_out is not None:
            seen = np.concatenate([seen, _from(held_out, later)])
        # A spike would leave no room for the rest, which the first panel shows with it.
        low, high = np.nanpercentile(seen, [0.2, 99.8])
        room = 0.05 * (high - low) or 0.1
        panels[1].set(xlim=(later, last + (last - later) / 50), ylim=(low - room, high + room))
        panels[1].set_title("the last three quarters")
    return Drawn(
        "Losses",
        "Loss on the batches that are trained on, each row that of one step, and on text that is "
        "held out. Bad signs: spikes that do not come back, a curve that turns up, held-out loss "
        "that rises while the other falls (the text is learned by heart).",
        figure,
    )


def _from(one: Series, step: float) -> np.ndarray:
    return one.values_R[one.steps_R >= step]


def draw_learning_rate(history: History) -> Drawn | None:
    rate = series(history.rows, "learning_rate")
    if rate is None:
        return None
    figure, axes = _single(1.9)
    axes.plot(*thin(rate), color=BLUE)
    axes.set_ylabel("learning rate")
    axes.set_ylim(0, 1.1 * np.nanmax(rate.values_R) or None)
    _count_steps(axes)
    return Drawn(
        "Learning rate",
        f"Schedule {history.config.optimizer.schedule} with its warmup, up to "
        f"{history.config.optimizer.learning_rate:g}. A bad sign: jumps, which it has where "
        "training.steps was changed on the way.",
        figure,
    )


def draw_gradient_norm(history: History) -> Drawn | None:
    norm = series(history.rows, "gradient_norm")
    if norm is None:
        return None
    figure, axes = _single(3.0)
    _draw_curve(axes, norm)
    if history.config.optimizer.clip_norm is not None:
        label = f"clipped to {history.config.optimizer.clip_norm:g}"
        axes.axhline(history.config.optimizer.clip_norm, color=GREEN, linestyle="--", label=label)
    skipped = [row["step"] for row in history.rows if row.get("skipped")]
    if skipped:
        axes.plot(
            *(skipped, np.full(len(skipped), 0.03)),
            "^",
            color=ORANGE,
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label="steps skipped",
        )
    _mark_events(axes, history)
    _scale_by_span(axes, norm)
    _count_steps(axes)
    axes.set_ylabel("norm")
    _legend_beside(axes)
    return Drawn(
        "Gradient norm",
        "Of all parameters together, before clipping; triangles stand where steps since the row "
        "before changed nothing. Bad signs: a norm that keeps growing, more and more spikes, "
        "steps skipped again and again.",
        figure,
    )


def draw_norms_by_parameter(history: History) -> Drawn | None:
    shown = {"norms of gradients": _by_parameter(history.sampled, "gradient_norm")}
    rate = series(history.sampled, "learning_rate")
    updates = _by_parameter(history.sampled, "update_norm")
    if rate is None:
        shown["norms of updates"] = updates
    else:  # whose own course would hide all others
        shown["norms of updates, per learning rate"] = {
            name: _divide(one, rate) for name, one in updates.items()
        }
    shown = {title: by_parameter for title, by_parameter in shown.items() if by_parameter}
    if not shown:
        return None
    heights = [len(by_parameter) for by_parameter in shown.values()]
    figure = Figure(figsize=(WIDTH, 0.16 * sum(heights) + 0.9 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for axes, (title, by_parameter) in zip(panels, shown.items(), strict=True):
        mesh = _draw_norms(axes, by_parameter)
        axes.set_title(title, loc="left")
    _count_steps(panels[-1])
    bar = figure.colorbar(mesh, ax=list(panels), extend="both", aspect=40, pad=0.01)
    ticks = [1 / TIMES_OF_MEDIAN, 1, TIMES_OF_MEDIAN]
    bar.set_ticks(ticks, labels=["a tenth", "median", "10 times"])
    bar.minorticks_off()
    return Drawn(
        "Norms by parameter",
        "Each row is a parameter, over all of its layers, with the median of its norm over the "
        "run; colours tell how far above or below that it is. Bad signs: one row that turns dark "
        "alone, or a change of colour that does not fade.",
        figure,
    )


def _by_parameter(rows: Sequence[Row], prefix: str) -> dict[str, Series]:
    names = [name for name in _names(rows) if name.startswith(f"{prefix}/")]
    found = {name.partition("/")[2]: series(rows, name) for name in names}
    # Some have no gradient: the routers' biases.
    return {
        name: one for name, one in found.items() if one is not None and np.nanmax(one.values_R) > 0
    }


def _divide(one: Series, other: Series) -> Series:
    """By what the other has at the same steps; nan where that is nothing."""
    divisors = dict(zip(other.steps_R.tolist(), other.values_R.tolist(), strict=True))
    values_R = [divisors.get(step) or np.nan for step in one.steps_R.tolist()]
    return Series(one.steps_R, one.values_R / np.array(values_R))


def _draw_norms(axes: Axes, by_parameter: dict[str, Series]) -> QuadMesh:
    """Draws norms relative to their medians, which stand behind the parameters' names."""
    labels, maps = [], []
    for name, one in by_parameter.items():
        finite = one.values_R[np.isfinite(one.values_R)]
        middle = np.median(finite) if finite.size else 0.0
        labels.append(f"{name}  {_short(middle)}")
        maps.append(means(Series(one.steps_R, one.values_R / (middle or np.nan))))
    # All are in the same rows.
    values_CP = np.stack([one.values_C for one in maps], axis=1)
    norm = LogNorm(1 / TIMES_OF_MEDIAN, TIMES_OF_MEDIAN)
    mesh = _draw_map(axes, maps[0].edges, values_CP, norm, "PuOr_r")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    return mesh


def draw_gates(history: History) -> Drawn | None:
    gates = series(history.sampled, "gate_by_loop")
    if gates is None or gates.values_R.ndim != 3:
        return None
    averages = means(gates)
    _, loops, layers = averages.values_C.shape
    figure = Figure(figsize=(WIDTH, loops * max(0.9 + 0.1 * layers, 1.8)), layout="constrained")
    grid = figure.subplots(loops, 2, squeeze=False, width_ratios=[4, 1], sharey="row", sharex="col")
    for loop, (axes, profile) in enumerate(grid):
        mesh = _draw_map(
            axes, averages.edges, averages.values_C[:, loop], Normalize(0, 1), "viridis", first=1
        )
        axes.set_title(f"loop {loop + 2}", loc="left")
        axes.set_ylabel("layer")
        profile.plot(gates.values_R[-1, loop], np.arange(1, layers + 1), "o-", color=BLUE)
        profile.set(xlim=(0, 1), title=f"at step {gates.steps_R[-1]:,}")
        profile.grid(True)
    _count_steps(grid[-1, 0])
    grid[-1, 1].set_xlabel("mean gate")
    figure.colorbar(mesh, ax=grid[:, 0].tolist(), pad=0.01, label="mean gate")
    return Drawn(
        "Gates",
        "How later loops share their attention out: at 1 all goes to loop 1's keys and values, at "
        "0 all to the loop's own window. Bad signs: layers that stay at 0 or at 1, where one of "
        "the two does nothing, and gates that never leave where they began.",
        figure,
    )


def draw_hidden_norms(history: History) -> Drawn | None:
    norms = series(history.sampled, "hidden_norm_by_loop")
    if norms is None or norms.values_R.ndim != 2:
        return None
    figure, axes = _single(2.6)
    for loop, (color, dash) in zip(range(norms.values_R.shape[1]), cycle(LINES), strict=False):
        one = Series(norms.steps_R, norms.values_R[:, loop])
        _draw_curve(axes, one, None, f"loop {loop + 1}", color, dash)
    _scale_by_span(axes, norms)
    _count_steps(axes)
    axes.set_ylabel("root mean square")
    _legend_beside(axes)
    return Drawn(
        "Hidden states by loop",
        "The size of what each loop puts out. Bad signs: one that grows without end, or far above "
        "the loop before it; loops that fall towards 0.",
        figure,
    )


def draw_expert_loads(history: History) -> Drawn | None:
    shown = _of_experts(history.rows, EXPERT_LINES, dimensions=1)
    if not shown:
        return None
    experts = history.config.model.moe.experts
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, one) in zip(panels, shown.items(), strict=True):
        _draw_curve(axes, one)
        axes.set_title(title)
        _count_steps(axes, ticks=4)
    return Drawn(
        "Experts",
        f"Of {experts} experts. Entropy is the mean over loops and layers, 1 "
        "where all have the same load; the largest load is the share of one expert's choices in "
        f"any loop and layer, {1 / max(experts, 1):.3g} where it is even. Bad "
        "signs: an entropy that falls, a largest load that grows, choices that are dropped.",
        figure,
    )


EXPERT_LINES = {
    "expert_load_entropy": "entropy of loads",
    "expert_max_load": "largest load",
    "experts_per_step": "experts that a position chooses",
    "expert_dropped": "share of choices dropped",
}


def draw_experts_by_loop(history: History) -> Drawn | None:
    shown = _of_experts(history.sampled, EXPERT_MAPS, dimensions=3)
    if not shown:
        return None
    experts = history.config.model.moe
    _, loops, layers = next(iter(shown.values())).values_R.shape
    height = len(shown) * (0.6 + 0.12 * max(layers, 3)) + 0.4
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(shown), loops, squeeze=False, sharex=True, sharey=True)
    for panels, (title, one) in zip(grid, shown.items(), strict=True):
        averages = means(one)
        norm = Normalize(np.nanmin(averages.values_C), np.nanmax(averages.values_C))
        for loop, axes in enumerate(panels):
            values_CJ = averages.values_C[:, loop]
            first = experts.dense_layers + 1
            mesh = _draw_map(axes, averages.edges, values_CJ, norm, "viridis", first)
            axes.set_title(f"{title}, loop {loop + 1}", loc="left")
        panels[0].set_ylabel("layer")
        figure.colorbar(mesh, ax=panels.tolist(), pad=0.01)
    for axes in grid[-1]:
        _count_steps(axes, ticks=max(7 - loops, 3))
    return Drawn(
        "Experts by loop and layer",
        "The same by loop and layer, and the mean squared log-normaliser of the routers. Bad "
        "signs: a layer or a loop that parts from the others, or a normaliser that keeps growing.",
        figure,
    )


EXPERT_MAPS = {
    "expert_load_entropy_by_loop": "entropy of loads",
    "expert_max_load_by_loop": "largest load",
    "router_z_by_loop": "squared log-normaliser",
    "expert_dropped_by_loop": "share dropped",
}


def _of_experts(rows: Sequence[Row], titles: dict[str, str], dimensions: int) -> dict[str, Series]:
    """Series of names that rows have, by title; without dropped choices where there are none."""
    found = {name: series(rows, name) for name in titles}
    return {
        titles[name]: one
        for name, one in found.items()
        if one is not None
        and one.values_R.ndim == dimensions
        and not (name.startswith("expert_dropped") and np.nanmax(one.values_R) == 0)
    }


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
        axes.set_title(f"{title} (median {_short(median)})")
        # A moment of twice the usual speed is a mark of the clock, not of the machine.
        axes.set_ylim(0, 1.1 * min(np.nanmax(one.values_R), 2 * median))
        axes.yaxis.set_major_formatter("{x:,g}")
        _mark_events(axes, history)
        _count_steps(axes, ticks=4)
    return Drawn(
        "Speed",
        "Of steps alone, without pauses, over all devices; a model's own arithmetic leaves out "
        "what is computed twice to save memory. Bad signs: a speed that sinks, or one that is "
        "another after a restart.",
        figure,
    )


SPEEDS = {
    "tokens_per_second": ("tokens per second", 1),
    "model_tflops_per_second": ("model TFLOP/s", 1),
    "mfu": ("MFU, percent", 100),
}
"""Titles of measures of speed, and what they are multiplied by."""


def draw_wall_time(history: History) -> Drawn | None:
    spent = history.spent
    if not spent:
        return None
    names = [name for name in (*PHASES, *(spent.keys() - PHASES)) if name in spent]
    seconds, total = [spent[name] for name in names], sum(spent.values())
    size, unit = _unit(total)
    known = [row for row in history.rows if row.get("time") is not None]
    timed = any(row[CLOCK] for row in known)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * max(len(names), 5)), layout="constrained")
    panels = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    bars = panels[0].barh(
        [PHASES.get(name, name) for name in names],
        np.divide(seconds, size),
        color=[GREEN if name == "steps" else GREY for name in names],
    )
    panels[0].bar_label(bars, [f"{one / total:.1%}" for one in seconds], padding=3)
    panels[0].invert_yaxis()
    panels[0].margins(x=0.15)
    panels[0].grid(axis="y", visible=False)
    panels[0].set_xlabel(f"wall time ({unit})")
    if timed:
        steps = np.array([row["step"] for row in known])
        start = began(next(row for row in known if row[CLOCK]))
        passed = np.array([row["time"] for row in known]) - start
        chosen = np.unique(np.linspace(0, len(known) - 1, 1000).astype(int))
        panels[1].plot(passed[chosen] / size, steps[chosen], color=BLUE)
        panels[1].set(xlabel=f"time since the first start ({unit})", ylabel="step")
        panels[1].set_xlim(left=0)
        panels[1].yaxis.set_major_formatter("{x:,.0f}")
    return Drawn(
        "Where the wall time went",
        "From the beginning of the first start to the newest row. Every start counts its seconds "
        "by phase from 0, and those of its last row are taken; a new start is seen by their fall. "
        "What lies between a start's last row and the beginning of the next (the time of its first "
        "row less its seconds) is counted as between starts: a last save, standing still, and the "
        "steps that were lost with a stop, whose rows are gone. Of the steps around a rollback "
        "each is taken to be as long, and those that it undid are counted apart. Bad signs: more "
        "than a few percent for anything but steps, and level stretches in the curve.",
        figure,
    )


def _unit(seconds: float) -> tuple[float, str]:
    """The seconds of a unit of time that suits so many, and its name."""
    if seconds >= 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 120 else (1.0, "seconds")


def _short(number: float) -> str:
    """Three digits, and no power of ten where there are more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _names(rows: Sequence[Row]) -> list[str]:
    """All that any row has, in their order."""
    names: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= names.keys():
            names |= dict.fromkeys(row)
    return list(names)


def _single(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _draw_map(
    axes: Axes, edges: np.ndarray, values_CK: np.ndarray, norm: Normalize, colors: str, first=0
) -> QuadMesh:
    """Draws values by step, from left to right, and number, from `first` on downwards."""
    count = values_CK.shape[1]
    axes.set_facecolor("#DDDDDD")  # where there is no number
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


def _mark_events(axes: Axes, history: History) -> None:
    """Lines where the run was restarted, and where it went back."""
    back = [one.step for one in rollbacks(history.rows)]
    for label, steps, style in (
        ("restart", restart_steps(history.starts), {"color": GREY, "linestyle": "--"}),
        ("went back", back, {"color": PINK, "linestyle": "-."}),
    ):
        if steps:
            axes.vlines(
                *(sorted(set(steps)), 0, 1),
                transform=axes.get_xaxis_transform(),
                label=label,
                linewidth=1.0,
                zorder=1.5,
                **style,
            )


def _count_steps(axes: Axes, ticks: int = 7) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_curve(
    axes: Axes,
    full: Series,
    logged: str | None = "as logged",
    smoothed: str = "smoothed",
    color: str = BLUE,
    dash: str = "-",
) -> None:
    """Draws what was logged and, of more than a few rows, its course behind the noise."""
    if len(full.steps_R) < FEW:
        axes.plot(*full, marker=".", color=color, linestyle=dash, label=logged or smoothed)
        return
    axes.plot(*thin(full), color=color, linewidth=0.8, alpha=0.35, label=logged)
    axes.plot(*smooth(full), color=color, linestyle=dash, label=smoothed)


def _scale_by_span(axes: Axes, full: Series) -> None:
    """A logarithmic scale for values of more than one magnitude."""
    positive = full.values_R[full.values_R > 0]
    if positive.size and positive.max() >= 10 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _legend_beside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


DRAWINGS = (
    draw_losses,
    draw_learning_rate,
    draw_gradient_norm,
    draw_norms_by_parameter,
    draw_gates,
    draw_hidden_norms,
    draw_expert_loads,
    draw_experts_by_loop,
    draw_speed,
    draw_wall_time,
)
"""In the order of the page."""
