"""Tables of numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Columns = Sequence[tuple[str, str, str]]
"""Columns of a table: for each, its key in the rows, its title, and the format of its numbers."""


def table_of(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with one line per row, which begins with the row's `label`.

    Columns for which no row has a number are left out.
    """
    used = [column for column in columns if any(column[0] in row for row in rows)]
    lines = [["", *(title for _, title, _ in used)]]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, _, form in used]
        lines.append([row["label"], *cells])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells in columns of even width; the first `left` columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if index < left else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
