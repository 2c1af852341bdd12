"""The table and the plot of the serving benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plt_jax.benchmarks.decode_report import new_figure, save_figure
from plt_jax.reports.tables import table_of

Report = dict[str, Any]
COLUMNS = (
    ("slots", "slots", "{}"),
    ("arrivals", "arrivals", "{}"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("range", "(range)", "{}"),
    ("seconds_to_no_loop", "time x no_loop", "{:.3f}"),
    ("step_ms", "step ms", "{:.1f}"),
    ("whole_step_ms", "at the whole context", "{:.1f}"),
    ("chunk_ms", "chunk ms", "{:.1f}"),
    ("between", "between tokens ms, 50/95/99 %", "{}"),
    ("first", "first token ms, 50/95/99 %", "{}"),
    ("stall", "99 % while a long prompt is admitted, x steady median", "{}"),
)


def table(report: Report) -> str:
    """A row for each scheme and number of slots."""
    about = report["machine"]
    heading = (
        f"{report['parameters'] / 1e6:.0f}M parameters, {report['dtype']}, {report['requests']} "
        f"requests of {report['new_tokens']} new tokens; {about['device']} ({about['processor']}, "
        f"{about['cores']} cores), Python {about['python']}, jax {about['jax']}"
    )
    return f"{heading}\n{table_of(COLUMNS, [_derived(row) for row in report['rows']])}\n"


def write(report: Report, folder: Path) -> None:
    """Writes serve.json, serve.txt and throughput.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serve.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = f"$ {report['command']}\n{table(report)}"
    (folder / "serve.txt").write_text(text, encoding="utf-8")
    _plot(report, folder / "throughput.png")


def _derived(row: Report) -> Report:
    """A row with its percentiles side by side."""
    low, high = row["tokens_per_second_min"], row["tokens_per_second_max"]
    derived: Report = {"range": f"({low:.1f}-{high:.1f})"}
    for name in ("between", "first"):
        if f"{name}_ms_50" in row:
            derived[name] = "/".join(f"{row[f'{name}_ms_{p}']:.0f}" for p in (50, 95, 99))
    if "stall" in row:
        derived["stall"] = f"{row['stall']['ratio']:.2f}"
    return row | derived


def _plot(report: Report, path: Path) -> None:
    """Plots the throughput of every scheme over the number of slots."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    labels = dict.fromkeys(row["label"] for row in report["rows"])
    for label in labels:
        rows = [row for row in report["rows"] if row["label"] == label and "step_ms" in row]
        axes.plot(
            [row["slots"] for row in rows],
            [row["tokens_per_second"] for row in rows],
            marker="o",
            label=label,
        )
    axes.set_xlabel("slots")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)
