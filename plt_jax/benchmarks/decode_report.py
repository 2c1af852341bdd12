"""Tables and plots of the decode benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_jax.reports.tables import table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]
COLUMNS = (
    ("ms", "ms/token", "{:.2f}"),
    ("range", "(range)", "{}"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("ratio_to_no_loop", "x no_loop", "{:.3f}"),
    ("ratio_range", "(range)", "{}"),
    ("ratio_to_vanilla", "x vanilla", "{:.3f}"),
    ("kv_mb", "KV MB", "{:.2f}"),
    ("gb_per_second", "GB/s read", "{:.1f}"),
    ("share", "of copy", "{:.0%}"),
    ("first_token_ms", "first token ms", "{:.0f}"),
    ("prefill_tokens_per_second", "prefill tokens/s", "{:.0f}"),
)


def heading(report: Report) -> str:
    """The line above the tables: the model, the machine and its memory's speed."""
    about = report["machine"]
    return (
        f"{report['parameters'] / 1e6:.0f}M parameters, {report['dtype']}, cache "
        f"{report['cache_dtype']}; {about['device']} ({about['processor']}, {about['cores']} "
        f"cores), Python {about['python']}, jax {about['jax']}; a copy reads and writes "
        f"{report['copy_gb_per_second']:.1f} GB/s in all"
    )


def table(report: Report, cell: Report) -> str:
    """The table of one batch size and context, with one row per scheme."""
    rows = [with_derived(report, row) for row in [*cell["rows"], *cell["peers"]]]
    title = f"batch {cell['batch']}, context {cell['context']}"
    if cell["prompt"]:
        title += f", prefill of {cell['prompt']}"
    return f"{title}\n{table_of(COLUMNS, rows)}\n"


def with_derived(report: Report, row: Report) -> Report:
    """A row with the figures that only the table shows: ranges, and shares of the copy's speed."""
    derived = {"range": f"({row['ms_min']:.2f}-{row['ms_max']:.2f})"}
    if "ratio_to_no_loop" in row:
        smallest, largest = row["ratio_to_no_loop_min"], row["ratio_to_no_loop_max"]
        derived["ratio_range"] = f"({smallest:.2f}-{largest:.2f})"
    if "kv_bytes" in row:
        derived["kv_mb"] = row["kv_bytes"] / 1e6
        derived["share"] = row["gb_per_second"] / report["copy_gb_per_second"]
    return row | derived


def write(report: Report, folder: Path) -> None:
    """Writes decode.json, decode.txt, and plots over all that the cells have several of."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = report["cells"]
    (folder / "decode.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([heading(report), "", *(table(report, cell) for cell in cells)])
    (folder / "decode.txt").write_text(f"$ {report['command']}\n{text}", encoding="utf-8")
    first = cells[0]
    plot_table(report, first, folder / "schemes.png")
    by_batch = [cell for cell in cells if cell["context"] == first["context"]]
    if len(by_batch) > 1:
        plot_lines(report, by_batch, "batch", folder / "batch.png")
    by_context = [cell for cell in cells if cell["batch"] == first["batch"]]
    if len(by_context) > 1:
        plot_lines(report, by_context, "context", folder / "context.png")
    if max(row["loops"] for row in first["rows"]) > 2:
        plot_loops(report, by_context, folder / "loops.png")


def plot_table(report: Report, cell: Report, path: Path) -> None:
    """Plots every scheme's latency and cache, as in the paper's Table 2."""
    rows = [*cell["rows"], *cell["peers"]][::-1]
    figure = new_figure(10, 0.45 * len(rows) + 1.6)
    axes = figure.subplots(1, 2, sharey=True)
    labels = [row["label"] for row in rows]
    errors = [
        [row["ms"] - row["ms_min"] for row in rows],
        [row["ms_max"] - row["ms"] for row in rows],
    ]
    axes[0].barh(labels, [row["ms"] for row in rows], xerr=errors, color="tab:blue", alpha=0.8)
    axes[0].set_xlabel("ms per token (median; whiskers: all rounds)")
    axes[1].barh(labels, [row.get("kv_bytes", 0) / 1e6 for row in rows], color="tab:orange")
    axes[1].set_xlabel("keys and values, MB")
    figure.suptitle(title(report, f"batch {cell['batch']}, context {cell['context']}"))
    save_figure(figure, path)


def plot_lines(report: Report, cells: list[Report], over: str, path: Path) -> None:
    """Plots latency, its ratio to no_loop, and the cache, by batch size or context."""
    figure = new_figure(14, 4.4)
    axes = figure.subplots(1, 3)
    x = [cell[over] for cell in cells]
    columns = (
        ("ms", "ms per token", 1.0),
        ("ratio_to_no_loop", "latency / no_loop", 1.0),
        ("kv_bytes", "keys and values, MB", 1e-6),
    )
    for axis, (name, label, unit) in zip(axes, columns, strict=True):
        for index, row in enumerate(cells[0]["rows"]):
            if name in row:
                y = [unit * cell["rows"][index][name] for cell in cells]
                axis.plot(x, y, marker="o", label=row["label"])
        axis.set(xscale="log", xlabel=over, ylabel=label, ylim=(0, None))
        axis.set_xticks(x, map(str, x))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    fixed = "context" if over == "batch" else "batch"
    figure.suptitle(title(report, f"{fixed} {cells[0][fixed]}"))
    save_figure(figure, path)


def plot_loops(report: Report, cells: list[Report], path: Path) -> None:
    """Plots latency, and the bytes of keys and values that a step reads, by number of loops."""
    figure = new_figure(10, 3.6 * len(cells))
    axes = figure.subplots(len(cells), 2, squeeze=False)
    for (latency, reads), cell in zip(axes, cells, strict=True):
        plain = [row for row in cell["rows"] if row["scheme"] == "no_loop"]
        for scheme in sorted({row["scheme"] for row in cell["rows"]} - {"no_loop"}):
            rows = plain + [row for row in cell["rows"] if row["scheme"] == scheme]
            loops = [row["loops"] for row in rows]
            latency.plot(loops, [row["ms"] for row in rows], marker="o", label=scheme)
            read = [row["cache_bytes_read"] / 1e6 for row in rows]
            reads.plot(loops, read, marker="o", label=scheme)
        latency.set_ylabel("ms per token")
        reads.set_ylabel("keys and values read, MB")
        for axis in (latency, reads):
            axis.set(xlabel="loops", title=f"context {cell['context']}", ylim=(0, None))
            axis.set_xticks(sorted({row["loops"] for row in cell["rows"]}))
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title(report, f"batch {cells[0]['batch']}"))
    save_figure(figure, path)


def title(report: Report, what: str) -> str:
    """A plot's title: the model, and what all of the plot has in common."""
    return f"{report['parameters'] / 1e6:.0f}M parameters, {report['dtype']}, {what}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, of so many inches."""
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height))


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
