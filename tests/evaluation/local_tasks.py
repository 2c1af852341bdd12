"""Tasks for the harness on rows at hand, in a folder for --include_path."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHOICES = """
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc}
"""
"""Rows have a start, choices that continue it, and the label of the right one."""


def write_task(folder: Path, name: str, settings: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes a task and its rows, rows.jsonl; returns the folder, which is made."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
    where = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    (folder / f"{name}.yaml").write_text(head + where + settings, encoding="utf-8")
    return folder
