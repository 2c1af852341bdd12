"""What a campaign of faults expects, and what it makes of what comes."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.kinds import FAULTS, Case, Fault
from benchmarks.faults.sandbox import Outcome, Sandbox
from plt_jax.errors import InputError
from plt_jax.reports.tables import aligned


def undisturbed(sandbox: Sandbox) -> Outcome:
    """What a run comes to that nobody disturbs, twice the same."""
    outcomes = []
    for name in ("undisturbed", "again"):
        config = sandbox.config(name)
        ended = sandbox.start(config).end()
        if ended.code:
            raise InputError(f"an undisturbed run ends with {ended.code}: {ended.error[-500:]}")
        outcomes.append(sandbox.outcome(config))
    if outcomes[0] != outcomes[1]:
        raise InputError("two undisturbed runs differ: this machine cannot tell a fault from none")
    return outcomes[0]


def judge(case: Case, fault: Fault) -> dict[str, Any]:
    """What came of a fault."""
    start = time.monotonic()
    try:
        found = {"ok": True, "outcome": fault(case)}
    except AssertionError as error:
        found = {"ok": False, "outcome": str(error)}
    except Exception:  # the campaign goes on, and reports it
        found = {"ok": False, "outcome": traceback.format_exc(limit=3)}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call found, by name."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line per kind."""
    tried = Counter(row["kind"] for row in rows.values())
    fine = Counter(row["kind"] for row in rows.values() if row["ok"])
    lines = [["fault", "tried", "as it should", "for example"]]
    for kind in FAULTS:
        examples = [row["outcome"] for row in rows.values() if row["kind"] == kind]
        if examples:
            lines.append([kind, str(tried[kind]), str(fine[kind]), examples[0]])
    lines.append(["all", str(sum(tried.values())), str(sum(fine.values())), ""])
    return aligned(lines, left=4)
