"""The page on a model's loops: the numbers of loops.json as figures with explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plt_jax.reports.html import (
    BLUE,
    GREEN,
    LINES,
    ORANGE,
    WIDTH,
    Drawn,
    compose_page,
    draw_all,
    section_html,
    table_html,
)

Numbers = Mapping[str, Any]


def loops_page(name: str, numbers: Numbers, table: Sequence[Sequence[str]]) -> str:
    """The page as HTML.

    Args:
      name: name of the run.
      numbers: the content of loops.json.
      table: cells of the table by loop, row by row, with the titles first.
    """
    loops = len(numbers["by_loop"])
    lines = [
        f"What each of the {loops} loops ({numbers['scheme']}) does at step {numbers['step']}, on "
        f"{numbers['tokens']:,} tokens of {numbers['sequences']} sequences of up to "
        f"{numbers['positions']} positions, {numbers['text']}.",
        "The measures are defined in LoopCoder-v2. Where a measure compares a loop with the one "
        "before, loop 1 is compared with the embeddings, or left out.",
    ]
    most = numbers["most_shifting_loop"]
    if most is not None:
        lines.append(f"Loop {most} changes the predictions most.")
    drawn = draw_all(partial(draw, numbers) for draw in DRAWINGS)
    return compose_page(f"{name}: loops", lines, [table_html(table), *map(section_html, drawn)])


def draw_predictions(numbers: Numbers) -> Drawn | None:
    return _by_loop(
        numbers,
        "Predictions",
        "The head applied to the output of every loop: loss in nats per token, the entropy of the "
        "prediction, the rank of the true token (1 if it is the most probable), and the KL "
        "divergence from the prediction of the loop before, in nats. Loops help if loss and rank "
        "fall up to the last loop; a last loop that changes little could be left out.",
        {
            "loss": "loss",
            "entropy": "entropy",
            "true_rank": "rank of the true token",
            "output_shift": "output shift",
        },
    )


def draw_states(numbers: Numbers) -> Drawn | None:
    return _by_loop(
        numbers,
        "States",
        "The step size ‖h(r) - h(r-1)‖ of the last layer's output; the cosine of that update with "
        "the update before (-1: back and forth, 1: same direction); the fixed-point gap, which is "
        "the step size of one more loop; and the effective rank, the number of directions that the "
        "states use. If step sizes and gaps shrink, the loops converge. If the gap stays large, "
        "the model depends on its number of loops.",
        {
            "step_size": "step size",
            "cosine": "cosine of updates",
            "fixed_point_gap": "fixed-point gap",
            "effective_rank": "effective rank",
        },
    )


def draw_offset(numbers: Numbers) -> Drawn | None:
    rows = [row for row in numbers["by_loop"] if "offset_cost" in row]
    if not rows:
        return None
    figure, axes = _figure(1)
    place = np.arange(len(rows))
    axes[0].bar(place - 0.2, [row["offset_cost"] for row in rows], 0.4, color=ORANGE, label="Ω")
    axes[0].bar(place + 0.2, [row["step_size"] for row in rows], 0.4, color=BLUE, label="step size")
    axes[0].set_xticks(place, [f"loop {row['loop']}" for row in rows])
    axes[0].legend()
    return Drawn(
        "Cost of the shift",
        "Ω is the distance between the states of neighbouring positions in the loop before. It is "
        "the cost of reading the previous position's state, whatever the model has learned. Beside "
        "it stands the loop's step size. Every loop of a shifted scheme pays Ω, so its step size "
        "should be large enough to be worth it.",
        figure,
    )


def draw_gates(numbers: Numbers) -> Drawn | None:
    return _by_layer(
        numbers,
        "Gates",
        "The weight of the attention to loop 1's keys and values in G-SWA, as a mean over heads "
        "and positions. The remaining weight goes to the loop's own window. Layers at 0 or 1 use "
        "only one of the two.",
        {"gate": "mean gate"},
        limits=(0, 1),
    )


def draw_attention(numbers: Numbers) -> Drawn | None:
    return _by_layer(
        numbers,
        "Attention",
        "Entropy of the attention in nats (high: spread out); its change, the KL divergence from "
        "the attention of the loop before; and how different the heads are: the effective rank of "
        "their attention maps, and the mean cosine of two heads. A loop whose attention does not "
        "change repeats the loop before; heads that become alike are redundant.",
        {
            "attention_entropy": "entropy",
            "attention_change": "change",
            "head_rank": "rank of heads",
            "head_cosine": "cosine of heads",
        },
    )


DRAWINGS = (draw_predictions, draw_states, draw_offset, draw_gates, draw_attention)
"""The functions that draw its figures, in their order."""


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure as wide as the page with panels side by side."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _by_loop(numbers: Numbers, title: str, text: str, shown: Mapping[str, str]) -> Drawn | None:
    """Draws a panel per measure, with a point per loop that has it."""
    rows = numbers["by_loop"]
    there = {name: label for name, label in shown.items() if any(name in row for row in rows)}
    if not there:
        return None
    figure, panels = _figure(len(there))
    for axes, (name, label) in zip(panels, there.items(), strict=True):
        points = [(row["loop"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), "o-", color=BLUE)
        axes.set(title=label, xlabel="loop", xlim=(0.7, len(rows) + 0.3))
        axes.set_xticks(range(1, len(rows) + 1))
        if name == "output_shift" and len(points) > 1:
            axes.plot(*max(points, key=lambda point: point[1]), "o", color=GREEN, markersize=9)
    return Drawn(title, text, figure)


def _by_layer(
    numbers: Numbers,
    title: str,
    text: str,
    shown: Mapping[str, str],
    limits: tuple[float, float] | None = None,
) -> Drawn | None:
    """Draws a panel per measure, with a line over the layers per loop that has it."""
    there = {name: label for name, label in shown.items() if name in numbers["by_layer"]}
    if not there:
        return None
    figure, panels = _figure(len(there))
    last, first = len(numbers["by_loop"]), numbers.get("first_layer", 1)
    for axes, (name, label) in zip(panels, there.items(), strict=True):
        lines = numbers["by_layer"][name]
        for index, values in enumerate(lines):
            loop = last - len(lines) + index + 1  # the first loops are the ones without values
            color, dash = LINES[(loop - 1) % len(LINES)]
            layers = range(first, first + len(values))
            axes.plot(layers, values, dash, marker=".", color=color, label=f"loop {loop}")
        axes.set(title=label, xlabel="layer")
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True)
        )
        if limits:
            axes.set_ylim(limits)
    panels[0].legend()
    return Drawn(title, text, figure)
