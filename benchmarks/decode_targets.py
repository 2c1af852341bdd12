"""Says which of decoding's targets on a GPU are met.

python -m benchmarks.decode_targets FOLDER [FOLDER ...]

Each FOLDER holds a decode.json of `plt_jax.benchmarks.decode`. PLT-2 is to take at most 1.03 times
no_loop at batches up to 16, and 1.06 at 64; PLT-3 1.06; and no_loop is to move its bytes at 75 % of
the copy bandwidth at batch 1. Beside each ratio stands that of commit 547d837, where it was
measured (benchmarks/results/decode.md, on an H100).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plt_jax.commands.parser import CommandParser, run_command

BEFORE = {("plt-2", 1): 1.118, ("plt-2", 4): 1.155, ("plt-2", 16): 1.200}
"""Ratios of commit 547d837 at 1024 tokens of context, by label and batch."""
COPY_SHARE = 0.75


def target(label: str, batch: int) -> float | None:
    """The largest ratio to no_loop that is asked for; None where none is."""
    if label == "plt-2":
        return 1.03 if batch <= 16 else 1.06
    return 1.06 if label == "plt-3" else None


def lines(report: dict[str, Any]) -> Iterator[str]:
    """One line for each target that a report's cells have."""
    for cell in report["cells"]:
        where = f"batch {cell['batch']}, context {cell['context']}"
        for row in cell["rows"]:
            label, ratio = row["label"], row.get("ratio_to_no_loop")
            asked = target(label, cell["batch"])
            if asked is not None and ratio is not None:
                old = BEFORE.get((label, cell["batch"])) if cell["context"] == 1024 else None
                before = f", before {old:.3f}" if old else ""
                yield _line(ratio <= asked, f"{label}, {where}: {ratio:.3f} of {asked}{before}")
            if label == "no_loop" and cell["batch"] == 1:
                share = row["gb_per_second"] / report["copy_gb_per_second"]
                yield _line(
                    share >= COPY_SHARE,
                    f"no_loop, {where}: {share:.0%} of copy, {COPY_SHARE:.0%} asked",
                )


def _line(met: bool, text: str) -> str:
    return f"{'met' if met else 'MISSED':8}{text}"


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.decode_targets", description=__doc__)
    parser.add_argument("folders", nargs="+", help="folders with a decode.json")
    for folder in parser.parse_args().folders:
        text = (Path(folder) / "decode.json").read_text(encoding="utf-8")
        print("\n".join(lines(json.loads(text))))


if __name__ == "__main__":
    run_command(main)
