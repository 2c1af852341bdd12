"""The rows of a run's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plt_jax.errors import InputError
from plt_jax.files.reading import check_regular
from plt_jax.runs.names import METRICS

MOST_BYTES = 2**20
"""Bytes of the longest row; one with the values of all loops and layers has some thousands."""

NUMBERS = {
    *("step", "loss", "validation_loss", "bits_per_byte", "tokens_per_second", "mfu", "goodput"),
    *("skipped", "expert_dropped", "rolled_back_from"),
}
"""The metrics that are one number, or null where it is not finite; others may be lists."""
LATEST = 1e11
"""Seconds since 1970 that no clock shows before the year 5138."""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; an incomplete last line, left by a kill, is dropped.

    Raises:
      InputError: the file cannot be read, or a line is no row.
    """
    path = directory / METRICS
    if not path.exists():
        return []
    check_regular(path)
    rows: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            while line := file.readline(MOST_BYTES):
                try:
                    rows.append(_row(line))
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n") and len(line) < MOST_BYTES:
                        break
                    problem = error if isinstance(error, InputError) else "is not JSON"
                    raise InputError(
                        f"{path} is damaged: line {len(rows) + 1} {problem}; take the line out"
                    ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return rows


def _row(line: bytes) -> dict[str, Any]:
    if len(line) == MOST_BYTES:
        raise InputError(f"has more than {MOST_BYTES:,} bytes")
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise InputError("is no row of metrics: it has no step")
    for name, value in row.items():
        if (name in NUMBERS or name.startswith("seconds/")) and not _is_number(value):
            raise InputError(f"has a {name} that is no number")
    time = row.get("time", 0)
    if not isinstance(time, int | float) or not 0 <= time < LATEST:
        raise InputError("has a time that is none")
    return row


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row without times and speeds, which differ between runs of the same configuration."""
    times = {"time", "tokens_per_second", "model_tflops_per_second", "mfu", "goodput"}
    return {
        name: value
        for name, value in row.items()
        if name not in times and not name.startswith("seconds/")
    }
