"""The page on a model's loops: what loops.json holds, drawn, with what each figure means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    """The page, HTML.

    Args:
      numbers: of loops.json.
      table: the cells by loop, below their titles.
    """
    loops = len(numbers["by_loop"])
    lines = [
        f"What each of the {loops} loops ({numbers['scheme']}) does at step {numbers['step']}, on "
        f"{numbers['tokens']:,} tokens of {numbers['sequences']} sequences of up to "
        f"{numbers['positions']} positions, {numbers['text']}.",
        "Measures as LoopCoder-v2 defines them. Where one compares with the loop before, loop 1 is "
        "compared with the embeddings, or left out.",
    ]
    most = numbers["most_shifting_loop"]
    if most is not None:
        lines.append(f"Loop {most} changes the prediction most.")
    drawn = draw_all(partial(draw, numbers) for draw in DRAWINGS)
    return compose_page(f"{name}: loops", lines, [table_html(table), *map(section_html, drawn)])


def draw_predictions(numbers: Numbers) -> Drawn | None:
    return _by_loop(
        numbers,
        "Predictions",
        "The head read out behind every loop: loss in nats per token, the entropy of the "
        "prediction, how many tokens are held at least as likely as the true one, and how far the "
        "prediction moved from that of the loop before (KL, nats). Loops help where loss and rank "
        "fall to the last one; a last loop that moves little is one that could be left out.",
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
        "How the last layer's output moves, ‖h(r) - h(r-1)‖; the cosine of that update with the "
        "one before (-1: back and forth, 1: further on); the fixed-point gap, how far one loop "
        "more would move it (the next loop's step, until the last); and how many directions "
        "states use. Updates and gaps that shrink "
        "speak of loops that settle, a gap that stays "
        "of a model that is used to its number of loops.",
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
        "What the shift moves",
        "Ω, the distance between neighbouring positions' states of the loop before: what reading "
        "the previous position's state costs, whatever is learned; beside it what the loop itself "
        "moves. Loops of a shifted scheme pay Ω each, so each should move enough to be worth it.",
        figure,
    )


def draw_gates(numbers: Numbers) -> Drawn | None:
    return _by_layer(
        numbers,
        "Gates",
        "The weight of attention to loop 1's keys and values in G-SWA, mean over heads and "
        "positions; the rest goes to the loop's own window. Layers at 0 or 1 use one of the two "
        "alone.",
        {"gate": "mean gate"},
        limits=(0, 1),
    )


def draw_attention(numbers: Numbers) -> Drawn | None:
    return _by_layer(
        numbers,
        "Attention",
        "Entropy of attention (nats; high: spread out), how far it moved from that of the loop "
        "before (KL), and how different the heads are: the effective rank of their maps and the "
        "mean cosine of two of them. Loops whose attention does not change do the same again; "
        "heads that become alike waste themselves.",
        {
            "attention_entropy": "entropy",
            "attention_change": "change",
            "head_rank": "rank of heads",
            "head_cosine": "cosine of heads",
        },
    )


DRAWINGS = (draw_predictions, draw_states, draw_offset, draw_gates, draw_attention)
"""In the order of the page."""


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _by_loop(numbers: Numbers, title: str, text: str, shown: Mapping[str, str]) -> Drawn | None:
    """A panel per measure, a point per loop that has it."""
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
    """A panel per measure, a line over the layers per loop that has it."""
    there = {name: label for name, label in shown.items() if name in numbers["by_layer"]}
    if not there:
        return None
    figure, panels = _figure(len(there))
    last = len(numbers["by_loop"])
    for axes, (name, label) in zip(panels, there.items(), strict=True):
        lines = numbers["by_layer"][name]
        for index, values in enumerate(lines):
            loop = last - len(lines) + index + 1  # those that are left out are the first
            color, dash = LINES[(loop - 1) % len(LINES)]
            layers = range(1, len(values) + 1)
            axes.plot(layers, values, dash, marker=".", color=color, label=f"loop {loop}")
        axes.set(title=label, xlabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if limits:
            axes.set_ylim(limits)
    panels[0].legend()
    return Drawn(title, text, figure)
