"""The ablation's tables and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plt_jax.benchmarks.decode_report import new_figure, save_figure
from plt_jax.files.writing import write_text
from plt_jax.reports.tables import aligned, table_of

Report = dict[str, Any]
COMPARISONS = (
    ("vanilla_loop-2", "no_loop", "a second loop"),
    ("clp-2", "vanilla_loop-2", "the shift"),
    ("clp_kv_share-2", "clp-2", "sharing keys and values"),
    ("plt-2", "clp_kv_share-2", "windows of own keys and values"),
    ("plt-2", "vanilla_loop-2", "everything that PLT changes"),
    ("plt-3", "plt-2", "a third loop"),
    ("no_loop-2x_layers", "plt-2", "twice the layers instead of a loop"),
)
"""Pairs of rows that are compared, and what the first one has that the second has not."""


def from_json(value: float | None) -> float:
    """A number of the report, whose JSON has null for a number that is not finite."""
    return math.nan if value is None else value


class Metric(NamedTuple):
    """The score by which runs are compared."""

    name: str
    title: str
    form: str
    score: Callable[[Mapping[str, Any]], float]
    """A run's score."""


BITS_PER_BYTE = Metric(
    "bits per byte",
    "bits per byte of held-out text (less is better)",
    "{:.4f}",
    lambda run: from_json(run["bits_per_byte"]),
)
EXACT_MATCH = Metric(
    "right",
    "problems of all difficulties answered correctly",
    "{:.1%}",
    lambda run: statistics.fmean(
        (row["accuracy"] for row in run["by_difficulty"]),
        [row["questions"] for row in run["by_difficulty"]],
    ),
)


def metric_of(report: Report) -> Metric:
    """The metric of the report's task."""
    return BITS_PER_BYTE if report["task"] == "none" else EXACT_MATCH


def write(report: Report, folder: Path) -> str:
    """Writes ablation.txt and, if there is anything to plot, the plots; returns the text."""
    text = text_of(report)
    write_text(folder / "ablation.txt", f"$ {report['command']}\n{text}\n")
    if report["rows"]:
        plot_scores(report, folder / "scores.png")
        plot_curves(report, folder / "curves.png")
        if report["task"] != "none":
            plot_difficulties(report, folder / "difficulties.png")
    return text


def text_of(report: Report) -> str:
    """All tables, below a line about the runs and the machine."""
    about, count = report["machine"], max((len(row["runs"]) for row in report["rows"]), default=0)
    seeds = "one seed" if count == 1 else f"{count} seeds (+-: their standard deviation)"
    parts = [
        f"{report['tokens']:,} tokens a run, {seeds}; {about['device']} ({about['processor']}, "
        f"{about['cores']} cores), Python {about['python']}, jax {about['jax']}",
        scores_table(report),
        differences_table(report),
    ]
    if report["task"] != "none":
        parts.append(difficulties_table(report))
    return "\n\n".join(part for part in parts if part)


def scores_table(report: Report) -> str:
    """One line per row: its mean score, its costs, and its decode latency."""
    metric = metric_of(report)
    decode = {row["label"]: row for row in (report["decode"] or {"rows": []})["rows"]}
    plain = next((row for row in report["rows"] if row["label"] == "no_loop"), None)
    lines = []
    for row in report["rows"]:
        scores = [metric.score(run) for run in row["runs"]]
        line = {
            "label": row["label"],
            "parameters": row["parameters"] / 1e6,
            "seeds": len(scores),
            "score": statistics.fmean(scores),
        }
        if len(scores) > 1:
            line["deviation"] = float(np.std(scores, ddof=1))
        if plain:
            line["flops"] = row["flops"] / plain["flops"]
        if row["label"] in decode:
            timed = decode[row["label"]]
            line |= {"ms": timed["ms"], "ratio": timed["ratio_to_no_loop"]}
            line["kv_bytes"] = timed["kv_bytes"] / 1e3
        lines.append(line)
    columns = (
        ("parameters", "M parameters", "{:.2f}"),
        ("flops", "x training FLOPs", "{:.2f}"),
        ("seeds", "seeds", "{}"),
        ("score", metric.name, metric.form),
        ("deviation", "+-", metric.form),
        ("ms", "ms/token", "{:.3f}"),
        ("ratio", "x no_loop", "{:.2f}"),
        ("kv_bytes", "KV kB", "{:.0f}"),
    )
    text = table_of(columns, lines)
    if decode:
        cell = report["decode"]
        text += (
            f"\ndecoding: batch {cell['batch']}, behind {cell['context']} tokens, weights as "
            f"initialised, {cell['machine']['device']}, jax {cell['machine']['jax']}"
        )
    return text


def differences(report: Report, label: str, other: str) -> list[float]:
    """A row's score minus another's, for every seed that both have."""
    metric = metric_of(report)
    scores = {
        row["label"]: {run["seed"]: metric.score(run) for run in row["runs"]}
        for row in report["rows"]
        if row["label"] in (label, other)
    }
    mine, others = scores.get(label, {}), scores.get(other, {})
    return [mine[seed] - others[seed] for seed in sorted(mine.keys() & others.keys())]


def differences_table(report: Report) -> str:
    """The differences between compared rows: mean, standard deviation, and seed by seed."""
    form = metric_of(report).form.replace("{:", "{:+")
    lines = [["difference", "by", "mean", "+-", "seed by seed"]]
    for label, other, what in COMPARISONS:
        found = differences(report, label, other)
        if found:
            deviation = form.format(float(np.std(found, ddof=1))).lstrip("+") if found[1:] else ""
            each = " ".join(map(form.format, found))
            mean = form.format(statistics.fmean(found))
            lines.append([f"{label} - {other}", what, mean, deviation, each])
    return aligned(lines, left=2) if lines[1:] else ""


def accuracies(row: Mapping[str, Any]) -> np.ndarray:
    """A row's accuracies, float [seeds, difficulties]."""
    return np.array([[one["accuracy"] for one in run["by_difficulty"]] for run in row["runs"]])


def difficulties(report: Report) -> Sequence[Mapping[str, Any]]:
    """The difficulties of the test set, in order; their accuracies are those of the first run."""
    return report["rows"][0]["runs"][0]["by_difficulty"]


def difficulties_table(report: Report) -> str:
    """The accuracy of every row at every difficulty: mean and standard deviation over seeds."""
    if not report["rows"]:
        return ""
    asked = difficulties(report)
    lines = [
        ["difficulty", *(f"{one['difficulty']}{'' if one['trained'] else '*'}" for one in asked)]
    ]
    for row in report["rows"]:
        found = accuracies(row)
        cells = [f"{mean:.1%}" for mean in found.mean(axis=0)]
        lines.append([row["label"], *cells])
        if len(found) > 1:
            lines.append(["  +-", *(f"{one:.1%}" for one in found.std(axis=0, ddof=1))])
    lines.append(["problems", *(str(one["questions"]) for one in asked)])
    note = "" if all(one["trained"] for one in asked) else "\n* not trained on"
    return aligned(lines) + note


def plot_scores(report: Report, path: Path) -> None:
    """Plots every run's score, and each row's mean."""
    metric = metric_of(report)
    rows = report["rows"][::-1]
    figure = new_figure(8, 0.45 * len(rows) + 1.4)
    axis = figure.subplots()
    for place, row in enumerate(rows):
        scores = [metric.score(run) for run in row["runs"]]
        axis.plot(scores, [place] * len(scores), "o", color="tab:blue", alpha=0.6)
        axis.plot([statistics.fmean(scores)], [place], "|", color="black", markersize=16)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axis.set(xlabel=f"{metric.title}: every seed, and the mean", ylim=(-0.6, len(rows) - 0.4))
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def plot_curves(report: Report, path: Path) -> None:
    """Plots the held-out loss by step: the mean over seeds, and their range.

    The last point is over all held-out sequences, the others over evaluation.sequences of them.
    """
    figure = new_figure(8, 4.8)
    axis = figure.subplots()
    for label, color, dash, row in styled_rows(report):
        curves = [dict(run["curve"]) for run in row["runs"]]
        steps = [step for step in curves[0] if all(step in curve for curve in curves)]
        losses = np.array([[from_json(curve[step]) for step in steps] for curve in curves])
        axis.plot(steps, losses.mean(axis=0), color=color, linestyle=dash, label=label)
        axis.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.15)
    what = "text" if report["task"] == "none" else "answers, teacher-forced"
    axis.set(xlabel="step", ylabel=f"held-out loss of {what}, nats per token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)


def plot_difficulties(report: Report, path: Path) -> None:
    """Plots the accuracy by difficulty: the mean over seeds, and their range."""
    figure = new_figure(8, 4.8)
    axis = figure.subplots()
    asked = difficulties(report)
    levels = [one["difficulty"] for one in asked]
    for label, color, dash, row in styled_rows(report):
        found = 100 * accuracies(row)
        axis.plot(levels, found.mean(axis=0), color=color, linestyle=dash, marker="o", label=label)
        axis.fill_between(levels, found.min(axis=0), found.max(axis=0), color=color, alpha=0.12)
    unseen = [one["difficulty"] for one in asked if not one["trained"]]
    for level in unseen:
        axis.axvline(level, color="grey", alpha=0.3, linewidth=8, zorder=0)
    axis.set(
        xlabel=f"difficulty of {report['task']} (grey: not trained on)",
        ylabel="answered rightly, %",
        ylim=(-2, 102),
    )
    axis.set_xticks(levels)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)


def styled_rows(report: Report) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Label, colour, line style and row: no_loop is black; three loops and 2x layers are dashed."""
    looped = iter(f"C{index}" for index in range(10))
    for row in report["rows"]:
        plain = row["label"].startswith("no_loop")
        dash = "--" if row["label"] in ("plt-3", "no_loop-2x_layers") else "-"
        yield row["label"], "black" if plain else next(looped), dash, row
