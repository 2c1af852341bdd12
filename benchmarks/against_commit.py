"""Compares the speed of decoding and training with that of another commit.

python -m benchmarks.against_commit COMMIT --out FOLDER

It checks the commit out into a temporary folder, and runs `plt_jax.benchmarks.decode` and
`plt_jax.benchmarks.train` of both in turn, each time in a process of its own: commit, working tree;
working tree, commit; and so on. A ratio is the working tree's time over the commit's in the same
round. FOLDER gets against_commit.json and against_commit.md. With its defaults it takes about eight
minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.rounds import ratios, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.errors import FailedError, InputError
from plt_jax.files.writing import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
COMMIT, WORKING_TREE = "commit", "working_tree"

Times = dict[str, list[list[float]]]
"""Milliseconds that a checkout's processes measured, by variant: a list for each process."""


class Workload(NamedTuple):
    """A benchmark with its options."""

    name: str
    unit: str
    command: tuple[str, ...]
    """The module and its options; `{out}` stands for the path of its figures."""

    def measure(self, checkout: Path, cache: Path) -> dict[str, list[float]]:
        """Runs the benchmark of a checkout; returns the milliseconds of its rounds by variant.

        Args:
          cache: folder for compiled programs, so that later processes need not compile.

        Raises:
          FailedError: the benchmark fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            done = subprocess.run(
                [sys.executable, "-m", *(word.format(out=out) for word in self.command)],
                cwd=checkout,
                env=os.environ
                | {
                    "PYTHONPATH": str(checkout),
                    "JAX_COMPILATION_CACHE_DIR": str(cache),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                },
                capture_output=True,
                text=True,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise FailedError(f"{self.name} in {checkout} ended with {done.returncode}: {last}")
            return read_times(out)


def read_times(out: Path) -> dict[str, list[float]]:
    """The milliseconds of every round, by variant, in a benchmark's JSON file or folder.

    Where decoding was measured at several batch sizes or contexts, they are part of the names.
    """
    if out.is_dir():
        cells = json.loads((out / "decode.json").read_text(encoding="utf-8"))["cells"]
        return {
            f"{row['label']}, batch {cell['batch']}, context {cell['context']}"
            if len(cells) > 1
            else row["label"]: row["rounds_ms"]
            for cell in cells
            for row in cell["rows"]
        }
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return {row["label"]: [1e3 * seconds for seconds in row["seconds"]] for row in rows}


def main() -> None:
    arguments = parse()
    commit = short_name(arguments.commit)
    with tempfile.TemporaryDirectory() as home, checked_out(commit, Path(home) / "tree") as tree:
        checkouts = {COMMIT: tree, WORKING_TREE: REPOSITORY}
        rows = [
            row
            for workload in workloads(arguments)
            for row in compare(workload, take_turns(workload, checkouts, arguments.rounds))
        ]
    report = {
        "command": " ".join(["python -m benchmarks.against_commit", *sys.argv[1:]]),
        "machine": machine(),
        "commit": commit,
        "head": short_name("HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    text = markdown(report)
    print(text)
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "against_commit.json", json.dumps(report, indent=1) + "\n")
        write_text(folder / "against_commit.md", text + "\n")


def parse() -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.against_commit", description=__doc__)
    parser.add_argument("commit", help="the commit to compare the working tree with")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each workload and side")
    parser.add_argument(
        "--decode", default="configs/decode_150m.yaml", help="configuration that is decoded"
    )
    parser.add_argument(
        "--dtypes", default="float32,bfloat16", help="dtypes of decoding; empty for no decoding"
    )
    parser.add_argument("--batch", default="1", help="batch sizes of decoding, such as 1,4")
    parser.add_argument("--context", default="1024", help="contexts of decoding, such as 1024,8192")
    parser.add_argument("--tokens", type=int, default=12, help="tokens of a round of decoding")
    parser.add_argument("--decode_rounds", type=int, default=5, help="rounds within a process")
    parser.add_argument(
        "--train",
        default="configs/tiny.yaml",
        help="configurations that are trained, separated by commas",
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="steps of a round of training; 0 measures none"
    )
    parser.add_argument("--train_rounds", type=int, default=4, help="rounds within a process")
    parser.add_argument("--schemes", default="no_loop,plt", help="looping schemes of both")
    parser.add_argument("--loops", default="2", help="numbers of loops of both, such as 2,3")
    parser.add_argument("--out", help="folder for the figures and the table")
    arguments = parser.parse_args()
    for name in ("rounds", "decode_rounds", "train_rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    return arguments


def workloads(arguments: argparse.Namespace) -> Iterator[Workload]:
    """What is measured: decoding in every dtype, and training."""
    shared = ("--schemes", arguments.schemes, "--loops", arguments.loops, "--out", "{out}")
    for dtype in filter(None, arguments.dtypes.split(",")):
        words = (arguments.decode, "--dtype", dtype, "--batch", arguments.batch)
        words += ("--context", arguments.context, "--tokens", str(arguments.tokens))
        words += ("--rounds", str(arguments.decode_rounds), *shared)
        name = f"decode, {dtype}"
        yield Workload(name, "ms/token", ("plt_jax.benchmarks.decode", *words))
    if not arguments.steps:
        return
    for config in arguments.train.split(","):
        # Of this checkout, for both: the commit may not have it.
        words = (str(REPOSITORY / config), "--steps", str(arguments.steps))
        words += ("--rounds", str(arguments.train_rounds), *shared)
        name = f"train, {Path(config).stem}"
        yield Workload(name, "ms/step", ("plt_jax.benchmarks.train", *words))


def git(*words: str) -> str:
    """What a git command prints.

    Raises:
      InputError: it fails.
    """
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"git {words[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def short_name(commit: str) -> str:
    """A commit's abbreviated hash."""
    return git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}")


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a new folder, as a worktree that is removed at the end."""
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def take_turns(workload: Workload, checkouts: dict[str, Path], rounds: int) -> dict[str, Times]:
    """Measures the checkouts in turn, the first one last in every second round."""
    found: dict[str, Times] = {name: {} for name in checkouts}
    with tempfile.TemporaryDirectory() as cache:
        for index in range(rounds):
            names = list(checkouts) if index % 2 == 0 else list(checkouts)[::-1]
            for name in names:
                print(f"{workload.name}, round {index + 1} of {rounds}: {name}", flush=True)
                times = workload.measure(checkouts[name], Path(cache))
                for label, values in times.items():
                    found[name].setdefault(label, []).append(values)
    return found


def compare(workload: Workload, found: dict[str, Times]) -> list[dict[str, Any]]:
    """A row for each variant that both checkouts measured.

    A difference is within noise if the median of one checkout lies between the smallest and largest
    time of the other.
    """
    rows = []
    for label in found[COMMIT].keys() & found[WORKING_TREE].keys():
        processes = {name: times[label] for name, times in found.items()}
        sides = {
            name: spread("ms", [value for values in lists for value in values])
            for name, lists in processes.items()
        }
        medians = {
            name: [statistics.median(values) for values in lists]
            for name, lists in processes.items()
        }
        old, new = sides[COMMIT], sides[WORKING_TREE]
        rows.append(
            {
                "workload": workload.name,
                "label": label,
                "unit": workload.unit,
                **sides,
                **spread("ratio", ratios(medians[WORKING_TREE], medians[COMMIT])),
                "within_noise": old["ms_min"] <= new["ms"] <= old["ms_max"]
                or new["ms_min"] <= old["ms"] <= new["ms_max"],
                "processes_ms": processes,
            }
        )
    return sorted(rows, key=lambda row: row["label"])


def markdown(report: dict[str, Any]) -> str:
    """The report as text with a table."""
    about = report["machine"]
    changes = " with uncommitted changes" if report["uncommitted_changes"] else ""
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['head']}{changes} against {report['commit']}: {report['rounds']} rounds; medians "
        f"(smallest-largest). {about['device']} ({about['processor']}, "
        f"{about['cores']} cores), Python {about['python']}, jax {about['jax']}.",
        "",
        f"| | | {report['commit']} | {report['head']} | ratio | within noise |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        sides = [f"{range_of(row[name], 'ms')} {row['unit']}" for name in (COMMIT, WORKING_TREE)]
        verdict = "yes" if row["within_noise"] else "no"
        lines.append(
            f"| {row['workload']} | {row['label']} | {sides[0]} | {sides[1]} | "
            f"{range_of(row, 'ratio')} | {verdict} |"
        )
    return "\n".join(lines)


def range_of(figures: dict[str, Any], name: str) -> str:
    """A median with its smallest and largest."""
    median, least, most = (figures[f"{name}{end}"] for end in ("", "_min", "_max"))
    digits = 3 if most < 10 else 1
    return f"{median:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


if __name__ == "__main__":
    run_command(main)
