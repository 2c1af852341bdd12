"""Disturbs small training runs in every way that kinds.py lists, and checks that they recover.

python -m benchmarks.faults --out FOLDER [--only WORDS] [--seed N] [--home FOLDER]

After each fault the run is resumed as a user would. It must end with the metrics and parameters of
an undisturbed run, bit for bit (within rounding if the number of processes changed), or stop with
the one right message and go on once the cause is removed. FOLDER/faults.jsonl has a line per trial;
a later call continues it. FOLDER/faults.txt is the table. Small disks need root.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.faults.buckets import stop_bucket_server
from benchmarks.faults.campaign import judge, read_rows, table, undisturbed
from benchmarks.faults.kinds import FAULTS
from benchmarks.faults.sandbox import Sandbox
from benchmarks.faults.trial import Trial
from plt_jax.benchmarks.machine import machine
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.errors import EXIT_DONE, EXIT_FAILED, InputError
from plt_jax.files.writing import write_text


def main() -> int:
    parser = CommandParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--out", default="measured", help="folder for faults.jsonl and faults.txt")
    parser.add_argument("--only", default="", help="kinds whose names contain this")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments, files and bits")
    parser.add_argument("--count", type=int, help="trials of each kind; default as kinds.py says")
    parser.add_argument("--home", help="folder to work in; default a temporary one")
    arguments = parser.parse_args()
    kinds = {name: fault for name, fault in FAULTS.items() if arguments.only in name}
    if not kinds:
        raise InputError(
            f"--only {arguments.only}: no kind is called so; known are {', '.join(FAULTS)}"
        )
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out / "faults.jsonl")
    with contextlib.ExitStack() as ended:
        ended.callback(stop_bucket_server)
        folder = tempfile.TemporaryDirectory(dir=arguments.home, ignore_cleanup_errors=True)
        home = ended.enter_context(folder)
        sandbox = Sandbox(Path(home))
        expected = undisturbed(sandbox)
        for kind, (fault, times) in kinds.items():
            for number in range(arguments.count or times):
                name = f"{kind} {number + 1}"
                if name in rows:
                    continue
                seed = f"{arguments.seed} {name}"
                trial = Trial(sandbox, expected, name.replace(" ", "_"), random.Random(seed))
                rows[name] = {"name": name, "kind": kind, "seed": arguments.seed}
                rows[name] |= judge(trial, fault)
                with open(out / "faults.jsonl", "a", encoding="utf-8") as lines:
                    lines.write(json.dumps(rows[name]) + "\n")
                print(
                    f"{'ok' if rows[name]['ok'] else 'FAILED':7}{name}: {rows[name]['outcome']}",
                    flush=True,
                )
                for folder in sandbox.home.glob(f"{trial.name}*"):
                    shutil.rmtree(folder, ignore_errors=True)
    text = table(rows)
    print(text)
    command = " ".join(["python -m benchmarks.faults", *sys.argv[1:]])
    write_text(out / "faults.txt", f"{text}\n\n{command}\n{json.dumps(machine())}\n")
    return EXIT_DONE if all(row["ok"] for row in rows.values()) else EXIT_FAILED


if __name__ == "__main__":
    run_command(main)
