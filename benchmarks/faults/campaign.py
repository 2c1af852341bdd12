"""The campaign's parts: the undisturbed result, one trial's verdict, and the table."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.kinds import FAULTS
from benchmarks.faults.sandbox import RunResult, Sandbox
from benchmarks.faults.trial import Fault, Trial
from plt_jax.errors import InputError
from plt_jax.reports.tables import aligned


def undisturbed(sandbox: Sandbox) -> RunResult:
    """The result of a run that nothing disturbs.

    Raises:
      InputError: such a run fails, or two of them differ.
    """
    results = []
    for name in ("undisturbed", "again"):
        config = sandbox.config(name)
        ended = sandbox.start(config).wait()
        if ended.code:
            raise InputError(f"an undisturbed run ends with {ended.code}: {ended.error[-500:]}")
        results.append(sandbox.result(config))
    if results[0] != results[1]:
        raise InputError(
            "two undisturbed runs differ, so a fault's effect cannot be told on this machine"
        )
    return results[0]


def judge(trial: Trial, fault: Fault) -> dict[str, Any]:
    """Runs a fault: whether all was as it should be, what happened, and the seconds it took."""
    start = time.monotonic()
    try:
        found = {"ok": True, "outcome": fault(trial)}
    except AssertionError as error:
        found = {"ok": False, "outcome": str(error)}
    except Exception as error:  # a fault's own error is a result of the campaign
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        found = {"ok": False, "outcome": f"{type(error).__name__}: {error} ({where})"}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows that an earlier call wrote, by the trial's name."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line per kind of fault."""
    tried = Counter(row["kind"] for row in rows.values())
    fine = Counter(row["kind"] for row in rows.values() if row["ok"])
    lines = [["fault", "tried", "as it should", "for example"]]
    for kind in FAULTS:
        examples = [row["outcome"] for row in rows.values() if row["kind"] == kind]
        if examples:
            lines.append([kind, str(tried[kind]), str(fine[kind]), examples[0]])
    lines.append(["all", str(sum(tried.values())), str(sum(fine.values())), ""])
    return aligned(lines, left=4)
