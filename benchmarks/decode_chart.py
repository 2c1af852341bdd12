"""Draws the chart of decode latency by scheme that the README shows.

python -m benchmarks.decode_chart [--out docs/images/decode_latency.svg]

The bars are the committed measurements in benchmarks/results/decode; the chart changes only when
they do. It is SVG text, which needs no plotting library, and serves a light and a dark page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent / "results" / "decode"
CHART = Path(__file__).resolve().parents[1] / "docs" / "images" / "decode_latency.svg"

# The goals of benchmarks/results/decode.md, as multiples of `no_loop`, by batch size and row.
CPU_GOALS = {1: {"plt-2": 1.12, "plt-3": 1.15}}
H100_GOALS = {1: {"plt-2": 1.03}, 4: {"plt-2": 1.06}, 16: {"plt-2": 1.06}}

WIDTH, ROW, BAR, TOP = 900, 24, 15, 92
STYLE = """\
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.panel { font-weight: 600 }
.quiet { fill: #59636e; font-size: 12px }
.card { fill: #ffffff; stroke: #d1d9e0 }
.no_loop { fill: #8c959f }
.serial { fill: #e0823d }
.one_pass { fill: #9ec5ef }
.plt { fill: #1f6feb }
.goal { stroke: #cf222e; stroke-width: 2.5 }
.base { stroke: #8c959f; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .quiet { fill: #9198a1 }
  .card { fill: #0d1117; stroke: #3d444d }
  .one_pass { fill: #355f92 }
  .plt { fill: #4c9aff }
  .goal { stroke: #ff7b72 }
}"""


class Row(NamedTuple):
    """One bar."""

    scheme: str
    label: str
    milliseconds: float
    """Time of one decode step, median over rounds."""
    ratio: float
    """To `no_loop` in the same rounds, median."""
    goal: float | None
    """What was asked of the ratio, if anything was."""


class Panel(NamedTuple):
    """The bars of one machine."""

    title: str
    machine: str
    groups: dict[int, list[Row]]
    """Rows by batch size."""


def read_panel(folder: str, title: str, machine: str, goals: dict[int, dict[str, float]]) -> Panel:
    """Reads one measurement; only the batch sizes that have goals are drawn."""
    made = json.loads((RESULTS / folder / "decode.json").read_text(encoding="utf-8"))
    groups = {}
    for cell in made["cells"]:
        if cell["batch"] not in goals:
            continue
        asked = goals[cell["batch"]]
        groups[cell["batch"]] = [
            Row(
                scheme=row["scheme"],
                label=row["scheme"] + (f", {row['loops']} loops" if row["loops"] > 1 else ""),
                milliseconds=row["ms"],
                ratio=row["ratio_to_no_loop"],
                goal=asked.get(row["label"]),
            )
            for row in cell["rows"]
        ]
    return Panel(title, machine, groups)


def panels() -> list[Panel]:
    """What the chart shows."""
    return [
        read_panel(
            "150m_bf16",
            "CPU: 154 million parameters, bfloat16",
            "2 cores of an AMD EPYC, jax 0.12.0",
            CPU_GOALS,
        ),
        read_panel(
            "1b_h100",
            "H100: 1.18 billion parameters, bfloat16",
            "NVIDIA H100 80GB HBM3, jax 0.11.2",
            H100_GOALS,
        ),
    ]


def draw_panel(panel: Panel, left: int) -> tuple[list[str], int]:
    """The lines of SVG of a panel whose text begins at `left`, and its height."""
    bars, width = left + 150, 160
    rows = [row for group in panel.groups.values() for row in group]
    scale = width / max(row.milliseconds for row in rows)
    lines = [
        f'<text class="panel" x="{left}" y="58">{panel.title}</text>',
        f'<text class="quiet" x="{left}" y="76">{panel.machine}</text>',
    ]
    y = TOP
    for batch, group in panel.groups.items():
        base = bars + scale * group[0].milliseconds
        lines.append(f'<text class="quiet" x="{left}" y="{y + 15}">batch {batch}</text>')
        y += ROW
        lines.append(
            f'<path class="base" d="M{base:.1f} {y - 3}V{y + ROW * len(group) - 4}" fill="none"/>'
        )
        for row in group:
            length, text_y = scale * row.milliseconds, y + 13
            end = bars + max(length, scale * group[0].milliseconds * (row.goal or 1))
            lines += [
                f'<text x="{left}" y="{text_y}">{row.label}</text>',
                f'<rect class="{colour(row.scheme)}" x="{bars}" y="{y + 1}" width="{length:.1f}" '
                f'height="{BAR}" rx="2"/>',
                f'<text x="{end + 8:.1f}" y="{text_y}">'
                f"{row.milliseconds:.{1 if row.milliseconds >= 10 else 2}f}\u00a0"
                f'<tspan class="quiet">ms, {row.ratio:.2f}x</tspan></text>',
            ]
            if row.goal is not None:
                goal = bars + scale * group[0].milliseconds * row.goal
                lines.append(f'<path class="goal" d="M{goal:.1f} {y - 2}V{y + BAR + 4}"/>')
            y += ROW
        y += 6
    return lines, y


def colour(scheme: str) -> str:
    """The class of a scheme's bar."""
    fixed = {"no_loop": "no_loop", "vanilla_loop": "serial", "plt": "plt"}
    return fixed.get(scheme, "one_pass")


def verdict(panel: Panel) -> str:
    """Whether a panel's rows meet their goals, in words."""
    found = [
        f"{row.ratio:.2f}x instead of {row.goal:.2f}x (batch {batch})"
        for batch, group in panel.groups.items()
        for row in group
        if row.goal is not None and row.ratio > row.goal
    ]
    return "missed, " + ", ".join(found) if found else "met"


def draw() -> str:
    """The chart as SVG."""
    drawn, heights = [], []
    for index, panel in enumerate(panels()):
        lines, height = draw_panel(panel, 24 + index * 440)
        drawn += lines
        heights.append(height)
    y = max(heights) + 12
    verdicts = [f"{panel.title.split(':')[0]}: {verdict(panel)}" for panel in panels()]
    height = y + 64
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" aria-labelledby="title">',
            '<title id="title">Decode latency by looping scheme, on a CPU and on an H100</title>',
            f"<style>\n{STYLE}\n</style>",
            f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            '<text class="title" x="24" y="30">Milliseconds per decode step, 1024 tokens of '
            "context (less is better)</text>",
            *drawn,
            f'<path class="goal" d="M30 {y - 10}V{y + 6}"/>',
            f'<text x="42" y="{y + 3}">The goal for PLT. On the {verdicts[0]}.</text>',
            f'<text x="42" y="{y + 23}">On the {verdicts[1]}.</text>',
            f'<text class="quiet" x="42" y="{y + 43}">x: times no_loop (dashed line). Medians of '
            "nine interleaved rounds. All measurements: benchmarks/results/decode.md</text>",
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the README's chart of decode latency.")
    parser.add_argument("--out", type=Path, default=CHART, help="where the SVG is written")
    parser.parse_args().out.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
