"""The rows of a run's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plt_jax.runs.names import METRICS


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; an incomplete last line, left by a kill, is dropped."""
    path = directory / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row without times and speeds, which differ between runs of the same configuration."""
    times = {"time", "tokens_per_second", "model_tflops_per_second", "mfu", "goodput"}
    return {
        name: value
        for name, value in row.items()
        if name not in times and not name.startswith("seconds/")
    }
