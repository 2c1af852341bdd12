"""The figures of a run's report that show its model: norms by parameter, gates, states, experts.

Array axes: C, groups of consecutive rows; P, parameters; J, layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from plt_jax.reports.html import BLUE, LINES, WIDTH, Drawn
from plt_jax.reports.plotting import (
    draw_curve,
    draw_map,
    label_steps,
    legend_beside,
    new_figure,
    scale_by_span,
    short,
)
from plt_jax.reports.run_history import History
from plt_jax.reports.series import Row, Series, means, series

TIMES_OF_MEDIAN = 10.0
"""The factor above and below the median that the colours of norms cover."""
EXPERT_CURVES = {
    "expert_load_entropy": "entropy of loads",
    "expert_max_load": "largest load",
    "experts_per_step": "experts per position",
    "expert_dropped": "share of choices dropped",
}
"""Titles of the curves of experts, by the name of the metric."""
EXPERT_MAPS = {
    "expert_load_entropy_by_loop": "entropy of loads",
    "expert_max_load_by_loop": "largest load",
    "router_z_by_loop": "squared log-normaliser",
    "expert_dropped_by_loop": "share dropped",
}
"""Titles of the maps of experts, by the name of the metric."""


def draw_norms_by_parameter(history: History) -> Drawn | None:
    shown = {"norms of gradients": _by_parameter(history.sampled, "gradient_norm")}
    rate = series(history.sampled, "learning_rate")
    updates = _by_parameter(history.sampled, "update_norm")
    if rate is None:
        shown["norms of updates"] = updates
    else:  # the course of the learning rate would hide all others
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
    label_steps(panels[-1])
    bar = figure.colorbar(mesh, ax=list(panels), extend="both", aspect=40, pad=0.01)
    ticks = [1 / TIMES_OF_MEDIAN, 1, TIMES_OF_MEDIAN]
    bar.set_ticks(ticks, labels=["1/10", "median", "10 times"])
    bar.minorticks_off()
    return Drawn(
        "Norms by parameter",
        "Each line is a parameter, all of its layers together, with the median of its norm over "
        "the run. Colours show how far the norm is above or below that median. Bad signs: a single "
        "line that turns dark, or a change of colour that stays.",
        figure,
    )


def _by_parameter(rows: Sequence[Row], prefix: str) -> dict[str, Series]:
    """The series `prefix/PARAMETER` of all parameters, by the parameter."""
    names = [name for name in _names(rows) if name.startswith(f"{prefix}/")]
    found = {name.partition("/")[2]: series(rows, name) for name in names}
    # The biases of routers have no gradient.
    return {
        name: one for name, one in found.items() if one is not None and np.nanmax(one.values_R) > 0
    }


def _divide(one: Series, other: Series) -> Series:
    """One series divided by another at the same steps; nan where that is 0 or missing."""
    divisors = dict(zip(other.steps_R.tolist(), other.values_R.tolist(), strict=True))
    values_R = [divisors.get(step) or np.nan for step in one.steps_R.tolist()]
    return Series(one.steps_R, one.values_R / np.array(values_R))


def _draw_norms(axes: Axes, by_parameter: dict[str, Series]) -> QuadMesh:
    """Draws norms relative to their medians; the labels are parameters with their medians."""
    # The metrics of all parameters are in the same rows, unless rows were changed or lost.
    rows = max(len(one.steps_R) for one in by_parameter.values())
    labels, maps = [], []
    for name, one in by_parameter.items():
        if one.values_R.shape != (rows,):
            continue
        finite = one.values_R[np.isfinite(one.values_R)]
        middle = np.median(finite) if finite.size else 0.0
        labels.append(f"{name}  {short(middle)}")
        maps.append(means(Series(one.steps_R, one.values_R / (middle or np.nan))))
    values_CP = np.stack([one.values_C for one in maps], axis=1)
    norm = LogNorm(1 / TIMES_OF_MEDIAN, TIMES_OF_MEDIAN)
    mesh = draw_map(axes, maps[0].edges, values_CP, norm, "PuOr_r")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    return mesh


def _names(rows: Sequence[Row]) -> list[str]:
    """The names of all metrics, in the order in which they first occur."""
    names: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= names.keys():
            names |= dict.fromkeys(row)
    return list(names)


def draw_gates(history: History) -> Drawn | None:
    gates = series(history.sampled, "gate_by_loop")
    if gates is None or gates.values_R.ndim != 3:
        return None
    averages, first = means(gates), history.config.model.looped_layers.start + 1
    _, loops, layers = averages.values_C.shape
    figure = Figure(figsize=(WIDTH, loops * max(0.9 + 0.1 * layers, 1.8)), layout="constrained")
    grid = figure.subplots(loops, 2, squeeze=False, width_ratios=[4, 1], sharey="row", sharex="col")
    for loop, (axes, profile) in enumerate(grid):
        mesh = draw_map(
            axes, averages.edges, averages.values_C[:, loop], Normalize(0, 1), "viridis", first
        )
        axes.set_title(f"loop {loop + 2}", loc="left")
        axes.set_ylabel("layer")
        profile.plot(gates.values_R[-1, loop], np.arange(first, first + layers), "o-", color=BLUE)
        profile.set(xlim=(0, 1), title=f"at step {gates.steps_R[-1]:,}")
        profile.grid(True)
    label_steps(grid[-1, 0])
    grid[-1, 1].set_xlabel("mean gate")
    figure.colorbar(mesh, ax=grid[:, 0].tolist(), pad=0.01, label="mean gate")
    return Drawn(
        "Gates",
        "How later loops divide their attention: at 1 all of it goes to loop 1's keys and values, "
        "at 0 all of it to the loop's own window. Bad signs: layers that stay at 0 or 1, where one "
        "of the two has no effect, and gates that never move from their start.",
        figure,
    )


def draw_hidden_norms(history: History) -> Drawn | None:
    norms = series(history.sampled, "hidden_norm_by_loop")
    if norms is None or norms.values_R.ndim != 2:
        return None
    figure, axes = new_figure(2.6)
    for loop, (color, dash) in zip(range(norms.values_R.shape[1]), cycle(LINES), strict=False):
        one = Series(norms.steps_R, norms.values_R[:, loop])
        draw_curve(axes, one, None, f"loop {loop + 1}", color, dash)
    scale_by_span(axes, norms)
    label_steps(axes)
    axes.set_ylabel("root mean square")
    legend_beside(axes)
    return Drawn(
        "Hidden states by loop",
        "Root mean square of each loop's output. Bad signs: a loop whose output keeps growing, or "
        "is far larger than that of the loop before; a loop whose output falls towards 0.",
        figure,
    )


def draw_expert_loads(history: History) -> Drawn | None:
    shown = _expert_series(history.rows, EXPERT_CURVES, dimensions=1)
    if not shown:
        return None
    experts = history.config.model.moe.experts
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, one) in zip(panels, shown.items(), strict=True):
        draw_curve(axes, one)
        axes.set_title(title)
        label_steps(axes, ticks=4)
    return Drawn(
        "Experts",
        f"Loads of the {experts} experts. The entropy is a mean over loops and layers; it is 1 if "
        "all experts have the same load. The largest load is the largest share of the choices that "
        f"one expert has in any loop and layer; it is {1 / max(experts, 1):.3g} if loads are even. "
        "Bad signs: an entropy that falls, a largest load that grows, choices that are dropped.",
        figure,
    )


def draw_experts_by_loop(history: History) -> Drawn | None:
    shown = _expert_series(history.sampled, EXPERT_MAPS, dimensions=3)
    if not shown:
        return None
    first = history.config.model.first_routed_layer + 1
    _, loops, layers = next(iter(shown.values())).values_R.shape
    height = len(shown) * (0.6 + 0.12 * max(layers, 3)) + 0.4
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(shown), loops, squeeze=False, sharex=True, sharey=True)
    for panels, (title, one) in zip(grid, shown.items(), strict=True):
        averages = means(one)
        norm = Normalize(np.nanmin(averages.values_C), np.nanmax(averages.values_C))
        for loop, axes in enumerate(panels):
            values_CJ = averages.values_C[:, loop]
            mesh = draw_map(axes, averages.edges, values_CJ, norm, "viridis", first)
            axes.set_title(f"{title}, loop {loop + 1}", loc="left")
        panels[0].set_ylabel("layer")
        figure.colorbar(mesh, ax=panels.tolist(), pad=0.01)
    for axes in grid[-1]:
        label_steps(axes, ticks=max(7 - loops, 3))
    return Drawn(
        "Experts by loop and layer",
        "The same for each loop and layer, and the mean squared log-normaliser of the routers. Bad "
        "signs: a layer or loop that departs from the others, a normaliser that keeps growing.",
        figure,
    )


def _expert_series(
    rows: Sequence[Row], titles: Mapping[str, str], dimensions: int
) -> dict[str, Series]:
    """The series of metrics that rows have, by title; dropped choices only if there are any."""
    found = {name: series(rows, name) for name in titles}
    return {
        titles[name]: one
        for name, one in found.items()
        if one is not None
        and one.values_R.ndim == dimensions
        and not (name.startswith("expert_dropped") and np.nanmax(one.values_R) == 0)
    }
