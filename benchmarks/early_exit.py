"""Times decode steps of the vanilla loop that stop their loops early, beside those that do not.

python -m benchmarks.early_exit CONFIG [--loops 4] [--batch 1] [--context 1024] [--out FOLDER]

An entropy rule that always holds ends every token behind loop 1, and one that never does lets it
run all loops and read a prediction after each. They are timed beside steps without a rule, and
beside a model without loops, in interleaved rounds. OUT/early_exit.txt is the table.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from plt_jax.benchmarks.decode import DecodeSettings, Workload
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.prepared import prepare_all
from plt_jax.benchmarks.rounds import interleave, ratios, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config.variants import NO_LOOP, Variant
from plt_jax.decoding.early_exit import ExitRule
from plt_jax.decoding.generation import BLOCK
from plt_jax.errors import InputError
from plt_jax.files.writing import write_text
from plt_jax.reports.tables import table_of
from plt_jax.runs.configuration import load_config

RULES = {
    "all loops": None,
    "none exits": ExitRule("entropy", 1e-30),
    "all exit behind loop 1": ExitRule("entropy", 1e30),
}


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.early_exit", description=__doc__)
    parser.add_argument("config", help="YAML file, whose model is measured")
    parser.add_argument("--loops", type=int, default=4, help="loops of the vanilla loop")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=9, help="rounds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--out", default="measured", help="folder for early_exit.txt")
    arguments = parser.parse_args()
    if arguments.loops < 2:
        raise InputError(f"--loops is {arguments.loops}; it must be 2 or more")
    base = load_config(arguments.config).model
    changes = {"max_length": arguments.context + BLOCK, "dtype": arguments.dtype or base.dtype}
    base = base.model_copy(update=changes)
    plain, looped = prepare_all([NO_LOOP, Variant("vanilla_loop", arguments.loops)], base)
    settings = DecodeSettings(rounds=arguments.rounds)
    workload = Workload(base, arguments.batch, arguments.context, settings)
    timers: dict[str, Callable[[], float]] = {
        "no_loop": functools.partial(workload.decode_seconds, plain)
    }
    for name, rule in RULES.items():
        timers[name] = functools.partial(workload.decode_seconds, looped, rule)
    seconds = interleave(timers, arguments.rounds)
    columns = (
        ("ms", "ms/token", "{:.3f}"),
        ("ms_min", "lowest", "{:.3f}"),
        ("ms_max", "highest", "{:.3f}"),
        ("ratio", "x no_loop", "{:.3f}"),
    )
    rows = [
        {
            "label": name,
            **spread("ms", [1e3 * one / settings.tokens for one in times]),
            **spread("ratio", ratios(times, seconds["no_loop"])),
        }
        for name, times in seconds.items()
    ]
    text = table_of(columns, rows)
    print(text)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.early_exit", *sys.argv[1:]])
    write_text(out / "early_exit.txt", f"{text}\n\n{command}\n{json.dumps(machine())}\n")


if __name__ == "__main__":
    run_command(main)
