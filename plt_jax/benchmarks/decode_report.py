"""Tables and plots of the decode benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Report = dict[str, Any]
COLUMNS = (
    ("ms", "ms/token", "{:.2f}"),
    ("spread", "(range)", "{}"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("ratio_to_no_loop", "x no_loop", "{:.3f}"),
    ("ratio_to_vanilla", "x vanilla", "{:.3f}"),
    ("kv_mb", "KV MB", "{:.2f}"),
    ("gb_per_second", "GB/s", "{:.1f}"),
    ("first_token_ms", "first token ms", "{:.0f}"),
    ("prefill_tokens_per_second", "prefill tokens/s", "{:.0f}"),
)


def heading(report: Report) -> str:
    """What was measured, on what."""
    about = report["machine"]
    return (
        f"{report['parameters'] / 1e6:.0f}M parameters, {report['dtype']}, cache "
        f"{report['cache_dtype']}; {about['device']} ({about['processor']}, {about['cores']} "
        f"cores), Python {about['python']}, jax {about['jax']}; a copy moves "
        f"{report['copy_gb_per_second']:.1f} GB/s"
    )


def table(cell: Report) -> str:
    """One batch size and context, a row per scheme."""
    rows = [with_derived(row) for row in [*cell["rows"], *cell["peers"]]]
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    texts = [["", *(title for _, title, _ in columns)]]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, _, form in columns]
        texts.append([row["label"], *cells])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    title = f"batch {cell['batch']}, context {cell['context']}"
    if cell["prompt"]:
        title += f", prefill of {cell['prompt']}"
    lines = [
        "  ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in texts
    ]
    return "\n".join([title, *lines, ""])


def with_derived(row: Report) -> Report:
    """A row with what the table shows besides."""
    derived = {"spread": f"({row['ms_min']:.2f}-{row['ms_max']:.2f})"}
    if "kv_bytes" in row:
        derived["kv_mb"] = row["kv_bytes"] / 1e6
    return row | derived


def write(report: Report, folder: Path) -> None:
    """Writes decode.json, decode.txt and the plots that the cells allow."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = report["cells"]
    (folder / "decode.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([heading(report), "", *map(table, cells)])
    (folder / "decode.txt").write_text(f"$ {report['command']}\n{text}", encoding="utf-8")
    first = cells[0]
    plot_table(report, first, folder / "schemes.png")
    by_batch = [cell for cell in cells if cell["context"] == first["context"]]
    if len(by_batch) > 1:
        plot_lines(report, by_batch, "batch", folder / "batch.png")
    by_context = [cell for cell in cells if cell["batch"] == first["batch"]]
    if len(by_context) > 1:
        plot_lines(report, by_context, "context", folder / "context.png")


def plot_table(report: Report, cell: Report, path: Path) -> None:
    """Latency and cache of every scheme, as in the paper's Table 2."""
    plt = pyplot()
    rows = [*cell["rows"], *cell["peers"]][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.45 * len(rows) + 1.6), sharey=True)
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
    save(figure, path)


def plot_lines(report: Report, cells: list[Report], over: str, path: Path) -> None:
    """Latency, its ratio to no_loop, and cache against the batch size or the context."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4))
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
    save(figure, path)


def title(report: Report, what: str) -> str:
    return f"{report['parameters'] / 1e6:.0f}M parameters, {report['dtype']}, {what}"


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
