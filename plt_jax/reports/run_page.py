"""One page on a training run (`python -m plt_jax.training.report` draws it).

The page is a single HTML file that contains its figures, for any browser and for paper. It is drawn
on the CPU from the files of the run directory, and the run may still be training.
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

from plt_jax.checkpoint.steps import list_steps
from plt_jax.config import RunConfig
from plt_jax.config.yaml_file import dump_config
from plt_jax.errors import InputError
from plt_jax.files.paths import is_folder, to_path
from plt_jax.files.writing import write_text
from plt_jax.model.costs import count_parameters, describe_loops
from plt_jax.reports.checkpoints import tabulate
from plt_jax.reports.html import compose_page, section_html, table_html
from plt_jax.reports.run_history import History, read_history
from plt_jax.reports.run_plots import draw_sections
from plt_jax.reports.run_summary import Summary, summarize, what_stands_out
from plt_jax.runs.names import CHECKPOINTS, locate

REPORT = "report.html"


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Draws the page of a run, writes it, and returns its path.

    Args:
      out: the file to write; default report.html in the run directory.

    Raises:
      InputError: there is no run at the path, the run has no metrics, or `out` cannot be written.
    """
    directory = locate(path).directory
    target = directory / REPORT if out is None else to_path(out)
    if is_folder(target):
        raise InputError(f"--out {target} is a folder; give a file in it")
    page = compose(
        directory.name,
        read_history(directory),
        tabulate(directory, list_steps(directory / CHECKPOINTS)),
    )
    # A folder's name may contain bytes that are not text.
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def heading(history: History) -> list[str]:
    """The lines below the title: the model, the training, and the time of the run."""
    config = history.config
    model, training = config.model, config.training
    count = count_parameters(model)
    active = f", {count.active:,} of them active per token" if model.moe.experts else ""
    start = f", from {config.start_from}" if config.start_from else ""
    lines = [
        f"{describe_loops(model)} of width {model.width}, "
        f"{count.total:,} parameters{active}, compute dtype {model.dtype}",
        f"trained on {config.data.text}, {training.batch_size} sequences of "
        f"{config.sequence_length} tokens per step, seed {config.seed}{start}",
    ]
    times = [row["time"] for row in history.rows if "time" in row]
    if times:
        lines.append(f"first row written {_moment(times[0])}, newest row {_moment(times[-1])}")
    return lines


def key_numbers(config: RunConfig, summary: Summary) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: name, value and a note, which may be empty.

    A number that the run's rows do not contain is left out.
    """
    step, total = summary.step, config.training.steps
    tokens = step * config.training.batch_size * config.sequence_length
    numbers = [
        ("step", f"{step:,}", f"of {total:,}" + (", finished" if step >= total else "")),
        ("tokens seen", _rounded(tokens), ""),
    ]
    for name, at in (("bits per byte", summary.last), ("best bits per byte", summary.best)):
        if at is not None:
            numbers.append((name, f"{at[1]:.4f}", f"at step {at[0]:,}"))
    if summary.tokens_per_second is not None:
        numbers.append(("tokens per second", f"{summary.tokens_per_second:,.0f}", "median"))
    if summary.mfu is not None:
        numbers.append(("MFU", f"{summary.mfu:.1%}", "median"))
    if summary.seconds is not None and summary.goodput is not None:
        numbers.append(("wall time", _duration(summary.seconds), "up to the newest row"))
        numbers.append(("goodput", f"{summary.goodput:.1%}", "of the wall time"))
    if summary.restarts is not None:
        numbers.append(("restarts", f"{summary.restarts:,}", ""))
    numbers.append(("steps skipped", f"{summary.skipped:,}", ""))
    numbers.append(("rollbacks", f"{len(summary.rollbacks):,}", ""))
    return numbers


def compose(name: str, history: History, checkpoints: Sequence[Sequence[str]]) -> str:
    """The page as HTML; all text in it is escaped.

    Args:
      name: title of the page.
      checkpoints: cells of the table of checkpoints, row by row, with the titles first.

    Raises:
      InputError: the values of a metric are not numbers, or differ in shape.
    """
    summary = summarize(history)
    tiles = (
        f"<div><dt>{html.escape(term)}</dt><dd>{html.escape(value)} "
        f"<small>{html.escape(note)}</small></dd></div>"
        for term, value, note in key_numbers(history.config, summary)
    )
    findings = [
        f"<li>{html.escape(sentence)}</li>" for sentence in what_stands_out(history, summary)
    ]
    parts = [
        f"<dl>{''.join(tiles)}</dl>",
        "<section><h2>Findings</h2>",
        f"<ul>{''.join(findings)}</ul>" if findings else "<p>Nothing unusual.</p>",
        "</section>",
        _checkpoints(checkpoints),
        *map(section_html, draw_sections(history)),
        "<details><summary>Full configuration</summary>",
        f"<pre>{html.escape(dump_config(history.config))}</pre></details>",
        f"<footer>written {html.escape(_moment(time.time()))}</footer>",
    ]
    return compose_page(name, heading(history), parts)


def _checkpoints(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) == 1:
        return "<section><h2>Checkpoints</h2><p>No checkpoint is saved yet.</p></section>"
    return (
        "<section><h2>Checkpoints</h2>\n<p>The files were checked without reading them; "
        "<code>python -m plt_jax.checkpoint verify</code> compares their checksums.</p>\n"
        f"{table_html(rows)}</section>"
    )


def _rounded(count: int) -> str:
    """A large count in words, such as 1.25 billion."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _moment(seconds: float) -> str:
    """A Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _duration(seconds: float) -> str:
    """A duration in seconds, minutes, or hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"
