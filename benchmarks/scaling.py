"""What the paper's shapes would take on TPU slices: compiled ahead of time, with no TPU.

python -m benchmarks.scaling --out FOLDER [--only "plt_dense_1b v5p:4x4x4"]

Each case is a `plt_jax.compile` in a process of its own; one that does not fit is tried again with
twice as many micro-batches. FOLDER/scaling.jsonl has a line per case and is gone on with;
FOLDER/scaling.txt is the table of all of them. Nothing here is measured but the compiler's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.distributed.chips import GIB, parse_topology
from plt_jax.errors import InputError
from plt_jax.files import write_text
from plt_jax.reports.tables import aligned

Row = dict[str, Any]

MESHES: dict[str, dict[str, dict[str, int]]] = {
    "plt_dense_1b": {
        "v5e:16x16": {"fsdp": 16},
        "v5p:4x4x4": {"fsdp": 8},
        "v5p:4x8x8": {"fsdp": 8},
        "tpu7x:4x4x4": {"fsdp": 8},
    },
    "plt_moe_1b_7b": {
        "v5e:16x16": {"expert": 16, "fsdp": 4},
        "v5p:4x4x4": {"expert": 8},
        "v5p:4x8x8": {"expert": 8},
        "tpu7x:4x4x4": {"expert": 8},
    },
    "plt_moe_680m_13b": {
        "v5e:16x16": {"expert": 16, "fsdp": 4},
        "v5p:4x4x4": {"expert": 8, "fsdp": 2},
        "v5p:4x8x8": {"expert": 8, "fsdp": 2},
        "tpu7x:4x4x4": {"expert": 8, "fsdp": 2},
    },
    "plt_moe_1.7b_40b": {
        "v5e:16x16": {"expert": 16, "fsdp": 16},
        "v5p:4x4x4": {"expert": 16, "fsdp": 4},
        "v5p:4x8x8": {"expert": 16, "fsdp": 4},
        "tpu7x:4x4x4": {"expert": 16, "fsdp": 4},
    },
    "moe_2.5b_60b": {
        "v5e:16x16": {"expert": 16, "fsdp": 16},
        "v5p:4x4x4": {"expert": 16, "fsdp": 4},
        "v5p:4x8x8": {"expert": 16, "fsdp": 4},
        "tpu7x:4x4x4": {"expert": 16, "fsdp": 4},
    },
}
"""Axis sizes by configuration and topology; data takes the other devices. Google Cloud calls the
v5p ones v5p-128 and v5p-512, after their cores."""

LOOPS = {"plt_moe_1.7b_40b": (1, 2), "moe_2.5b_60b": (1,)}
"""Of the mixtures that the paper compares with one another (Table 4), as it trains them, and the
looped one without its second loop; the others are compiled with 1, 2 and 3."""

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Case(NamedTuple):
    """One compile."""

    config: str
    topology: str
    loops: int

    @property
    def name(self) -> str:
        return f"{self.config} {self.topology} loops={self.loops}"


def all_cases() -> list[Case]:
    return [
        Case(config, topology, loops)
        for config, meshes in MESHES.items()
        for topology in meshes
        for loops in LOOPS.get(config, (1, 2, 3))
    ]


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument(
        "--out", default="measured", help="folder for scaling.jsonl and scaling.txt"
    )
    parser.add_argument(
        "--only", default="", help='cases whose names have all of these words, as in "v5p loops=2"'
    )
    parser.add_argument("--list", action="store_true", help="print the cases' names alone")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each compile")
    arguments = parser.parse_args()
    cases = [one for one in all_cases() if all(word in one.name for word in arguments.only.split())]
    if not cases:
        raise InputError(f"--only {arguments.only}: no case has these words; see --list")
    if arguments.list:
        print("\n".join(one.name for one in cases))
        return
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out / "scaling.jsonl")
    for case in cases:
        if case.name not in rows:
            print(case.name, flush=True)
            rows[case.name] = run_case(case, arguments.timeout)
            with open(out / "scaling.jsonl", "a", encoding="utf-8") as lines:
                lines.write(json.dumps(rows[case.name]) + "\n")
        write_text(out / "scaling.txt", table(rows) + "\n")
    print(table(rows))


def read_rows(path: Path) -> dict[str, Row]:
    """What earlier runs found, by the names of their cases."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def run_case(case: Case, timeout: int) -> Row:
    """Compiles a case with as few micro-batches as fit; what it took, or why it failed."""
    row: Row = {"name": case.name, **case._asdict(), "tries": []}
    accumulate = 1
    while True:
        start = time.perf_counter()
        found = compile_case(case, accumulate, timeout)
        row["tries"].append({"accumulate": accumulate, "seconds": time.perf_counter() - start})
        if "error" in found:
            # With several micro-batches: those no longer have a sequence for every device.
            if accumulate > 1 and "does not divide" in found["error"]:
                return row
            return row | found
        row["tries"][-1] |= {name: found[name] for name in ("memory", "fits")}
        row |= {"accumulate": accumulate, **found, "config": case.config}
        if found["fits"]:
            return row
        accumulate *= 2


def compile_case(case: Case, accumulate: int, timeout: int) -> Row:
    """What `plt_jax.compile` says of a case, or `error`: the last line that it wrote."""
    options = {f"mesh.{axis}": size for axis, size in MESHES[case.config][case.topology].items()}
    options |= {"model.loop.count": case.loops, "training.accumulate": accumulate}
    if "expert" not in MESHES[case.config][case.topology]:
        options["mesh.expert"] = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "estimate.json"
        command = [sys.executable, "-m", "plt_jax.compile", str(CONFIGS / f"{case.config}.yaml")]
        command += ["--topology", case.topology, "--json", str(path)]
        command += [f"--{name}={value}" for name, value in options.items()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {timeout} s"}
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
        return json.loads(path.read_text(encoding="utf-8"))


HEADINGS = (
    "configuration",
    "topology",
    "chips",
    "L",
    "mesh",
    "micro-batches",
    "fits",
    "GiB",
    "temp GiB",
    "s (fastest)",
    "s (slowest)",
    "MFU % (slowest-fastest)",
    "most time",
    "time x L=1",
    "speed-up",
)


def table(rows: dict[str, Row]) -> str:
    """All cases found so far, in their declared order.

    The last columns compare `fastest` with that of one loop, and with that of the smallest slice of
    the same chip.
    """
    lines: list[tuple[str, ...]] = [HEADINGS]
    for case in all_cases():
        if case.name in rows:
            lines.append(line(rows, case))
    return aligned(lines, left=len(HEADINGS))


def line(rows: dict[str, Row], case: Case) -> tuple[str, ...]:
    row = rows[case.name]
    chips = str(parse_topology(case.topology).chips)
    start = (case.config, case.topology, chips, str(case.loops))
    if "error" in row or "memory" not in row:
        return (*start, f"failed: {row.get('error', '')[:60]}", *[""] * (len(HEADINGS) - 5))
    mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)
    memory = row["memory"]
    sizes = (f"{memory['needed'] / GIB:.1f}", f"{memory['temporaries'] / GIB:.1f}")
    start += (mesh, str(row["accumulate"]), "yes" if row["fits"] else "no", *sizes)
    if "seconds" not in row:
        return (*start, *[""] * (len(HEADINGS) - len(start)))
    seconds, mfu = row["seconds"], row["mfu"]
    return (
        *start,
        f"{seconds['fastest']:.3f}",
        f"{seconds['slowest']:.3f}",
        f"{100 * mfu['slowest']:.1f}-{100 * mfu['fastest']:.1f}",
        row["dominating"],
        _ratio(row, rows.get(case._replace(loops=1).name)),
        _ratio(rows.get(_smallest(case).name), row),
    )


def _smallest(case: Case) -> Case:
    chip = case.topology.split(":")[0]
    same = [topology for topology in MESHES[case.config] if topology.split(":")[0] == chip]
    return case._replace(topology=min(same, key=lambda one: parse_topology(one).chips))


def _ratio(above: Row | None, below: Row | None) -> str:
    if not (above and below and "seconds" in above and "seconds" in below):
        return ""
    return f"{above['seconds']['fastest'] / below['seconds']['fastest']:.2f}"


if __name__ == "__main__":
    run_command(main)
