"""The memory and time bounds of the paper's shapes on TPU slices, compiled without a TPU.

python -m benchmarks.scaling --out FOLDER [--only "plt_dense_1b v5p:4x4x4"]

Each case is a `plt_jax.compile` in a process of its own. A case that does not fit is compiled again
with twice as many micro-batches. FOLDER/scaling.jsonl has a line per job, and a later call
continues it; FOLDER/scaling.txt is the table of all cases. Memory is the compiler's figure; times
are bounds, not measurements.
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
from plt_jax.files.writing import write_text
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
"""Mesh axis sizes by configuration and topology; the data axis takes the remaining devices. Google
Cloud calls the v5p slices v5p-128 and v5p-512, after their cores."""

LOOPS = {"plt_moe_1.7b_40b": (1, 2), "moe_2.5b_60b": (1,)}
"""Numbers of loops of the two mixtures that the paper's Table 4 compares, as it trains them, and of
the looped one without its second loop. The other configurations are compiled with 1, 2 and 3."""

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class CompileJob(NamedTuple):
    """A configuration to compile for a topology, with a number of loops."""

    config: str
    topology: str
    loops: int

    @property
    def name(self) -> str:
        return f"{self.config} {self.topology} loops={self.loops}"


def all_jobs() -> list[CompileJob]:
    """All jobs of the study, in the table's order."""
    return [
        CompileJob(config, topology, loops)
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
        "--only",
        default="",
        help='cases whose names contain all of these words, such as "v5p loops=2"',
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of the cases, and compile none"
    )
    parser.add_argument(
        "--timeout", type=int, default=1800, help="seconds that one compile may take"
    )
    arguments = parser.parse_args()
    jobs = [one for one in all_jobs() if all(word in one.name for word in arguments.only.split())]
    if not jobs:
        raise InputError(f"--only {arguments.only}: no case has these words; see --list")
    if arguments.list:
        print("\n".join(one.name for one in jobs))
        return
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out / "scaling.jsonl")
    for job in jobs:
        if job.name not in rows:
            print(job.name, flush=True)
            rows[job.name] = run_job(job, arguments.timeout)
            with open(out / "scaling.jsonl", "a", encoding="utf-8") as lines:
                lines.write(json.dumps(rows[job.name]) + "\n")
        write_text(out / "scaling.txt", table(rows) + "\n")
    print(table(rows))


def read_rows(path: Path) -> dict[str, Row]:
    """Rows that earlier calls wrote, by the names of their jobs."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def run_job(job: CompileJob, timeout: int) -> Row:
    """Compiles a job with as few micro-batches as fit; the estimate, or the error."""
    row: Row = {"name": job.name, **job._asdict(), "tries": []}
    accumulate = 1
    while True:
        start = time.perf_counter()
        found = compile_job(job, accumulate, timeout)
        row["tries"].append({"accumulate": accumulate, "seconds": time.perf_counter() - start})
        if "error" in found:
            # There are now fewer sequences in a micro-batch than devices: keep the last estimate.
            if accumulate > 1 and "does not divide" in found["error"]:
                return row
            return row | found
        row["tries"][-1] |= {name: found[name] for name in ("memory", "fits")}
        row |= {"accumulate": accumulate, **found, "config": job.config}
        if found["fits"]:
            return row
        accumulate *= 2


def compile_job(job: CompileJob, accumulate: int, timeout: int) -> Row:
    """The JSON of `plt_jax.compile` for a job, or the last line of its error as `error`."""
    options = {f"mesh.{axis}": size for axis, size in MESHES[job.config][job.topology].items()}
    options |= {"model.loop.count": job.loops, "training.accumulate": accumulate}
    if "expert" not in MESHES[job.config][job.topology]:
        options["mesh.expert"] = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "estimate.json"
        command = [sys.executable, "-m", "plt_jax.compile", str(CONFIGS / f"{job.config}.yaml")]
        command += ["--topology", job.topology, "--json", str(path)]
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
    """All jobs compiled so far, as text.

    The last two columns compare the `fastest` bound with that of one loop, and with that of the
    smallest slice of the same chip.
    """
    lines: list[tuple[str, ...]] = [HEADINGS]
    for job in all_jobs():
        if job.name in rows:
            lines.append(line(rows, job))
    return aligned(lines, left=len(HEADINGS))


def line(rows: dict[str, Row], job: CompileJob) -> tuple[str, ...]:
    row = rows[job.name]
    chips = str(parse_topology(job.topology).chips)
    start = (job.config, job.topology, chips, str(job.loops))
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
        _ratio(row, rows.get(job._replace(loops=1).name)),
        _ratio(rows.get(_smallest(job).name), row),
    )


def _smallest(job: CompileJob) -> CompileJob:
    chip = job.topology.split(":")[0]
    same = [topology for topology in MESHES[job.config] if topology.split(":")[0] == chip]
    return job._replace(topology=min(same, key=lambda one: parse_topology(one).chips))


def _ratio(above: Row | None, below: Row | None) -> str:
    if not (above and below and "seconds" in above and "seconds" in below):
        return ""
    return f"{above['seconds']['fastest'] / below['seconds']['fastest']:.2f}"


if __name__ == "__main__":
    run_command(main)
