"""The paper's ablation (PLT, Table 2): what each part of PLT changes, on the same tokens.

python -m plt_jax.benchmarks.ablation CONFIG [--section.field value ...]

It trains every row of the table from the same seeds; each run has its own directory,
RUN_DIR/ROW/seed_N. If the command is stopped, the same command continues; --rows restricts it to
some rows. After every run it writes ablation.json, a table and plots of all finished runs. Runs on
data.synthetic are scored by exact match, others by bits per byte of held-out text. At the end it
times every row's decoding (plt_jax.benchmarks.decode).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from plt_jax.benchmarks import ablation_report
from plt_jax.benchmarks.decode import DecodeSettings, Workload
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.prepared import prepare_all
from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import ModelConfig, RunConfig
from plt_jax.config.variants import NO_LOOP, Variant
from plt_jax.decoding.generation import BLOCK
from plt_jax.distributed import processes, rendezvous
from plt_jax.errors import EXIT_STOPPED, InputError
from plt_jax.evaluation.exact_match import EXACT_MATCH, TEST_PROBLEMS, evaluate_exact_match
from plt_jax.files.writing import write_text
from plt_jax.model.costs import count_parameters, flops_by_loop
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import CONFIG
from plt_jax.runs.resume import check_directory
from plt_jax.training.trainer import train

ABLATION, DECODE, LOCK = "ablation.json", "decode.json", ".lock"
ROWS = (
    NO_LOOP,
    Variant("vanilla_loop", 2),
    Variant("clp", 2),
    Variant("clp_kv_share", 2),
    Variant("plt", 2),
    Variant("plt", 3),
    Variant("no_loop", 1, depth=2),
)
"""The rows of Table 2, and one of twice the layers, which has the FLOPs of two loops."""


def main(words: Sequence[str] | None = None) -> int | None:
    words = list(sys.argv[1:] if words is None else words)
    arguments, config = parse(words)
    rendezvous.initialize(config.processes)
    if not processes.is_single():
        raise InputError("the ablation trains in one process, on all of its devices; start one")
    variants = [row for row in ROWS if arguments.rows is None or row.label in arguments.rows]
    folder = config.directory
    for seed in range(config.seed, config.seed + arguments.seeds):
        for variant in variants:
            run = run_config(config, variant, seed)
            print(f"== {variant.label}, seed {seed}", flush=True)
            if finished(run) is None:
                if train(run).stopped:
                    return EXIT_STOPPED
                if config.data.synthetic.task != "none":
                    print(evaluate_exact_match(str(run.directory)).table(), flush=True)
                jax.clear_caches()  # the next row has programs of its own
                write_report(words, config)
    if arguments.decode_rounds and arguments.rows is None:
        settings = DecodeSettings(rounds=arguments.decode_rounds)
        figures = time_decoding(config.model, ROWS, arguments.decode_batch, settings)
        about = {"command": command_of(words), "machine": machine()}
        write_text(folder / DECODE, json.dumps(about | figures, indent=1) + "\n")
    print(write_report(words, config))
    return None


def parse(words: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = CommandParser(prog="python -m plt_jax.benchmarks.ablation", description=__doc__)
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(","),
        help=f"some of {','.join(variant.label for variant in ROWS)}; default all",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each row; seeds count from --seed"
    )
    parser.add_argument(
        "--decode_batch", type=int, default=4, help="batch size at which decoding is timed"
    )
    parser.add_argument(
        "--decode_rounds",
        type=int,
        default=DecodeSettings().rounds,
        help="how many times each row's decoding is timed; 0, or --rows: not at all",
    )
    config = parse_run_config(parser, words)
    arguments = parser.parse_args(words)
    labels = [variant.label for variant in ROWS]
    if unknown := [name for name in arguments.rows or () if name not in labels]:
        raise InputError(f"--rows has no row {unknown[0]}; there are {', '.join(labels)}")
    for name, least in (("seeds", 1), ("decode_batch", 1), ("decode_rounds", 0)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be {least} or more")
    return arguments, config


def run_config(config: RunConfig, variant: Variant, seed: int) -> RunConfig:
    """The configuration of a row's run with a seed."""
    directory = str(config.directory / variant.label / f"seed_{seed}")
    run = variant.apply_to_run(config)
    return run.model_copy(update={"seed": seed, "run_dir": directory})


def command_of(words: Sequence[str]) -> str:
    """The command as it was typed."""
    return " ".join(["python -m plt_jax.benchmarks.ablation", *words])


def write_report(words: Sequence[str], config: RunConfig) -> str:
    """Writes ablation.json, the table and the plots of all finished runs; returns the table.

    A lock lets commands that train different rows at the same time write one after another.
    """
    folder = config.directory
    decode = folder / DECODE
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = {
            "command": command_of(words),
            "machine": machine(),
            "config": config.model_dump(mode="json"),
            "task": config.data.synthetic.task,
            "tokens": config.training.steps * config.training.batch_size * config.sequence_length,
            "rows": list(rows(config)),
            "decode": json.loads(decode.read_text(encoding="utf-8")) if decode.exists() else None,
        }
        write_text(folder / ABLATION, json.dumps(report, indent=1) + "\n")
        return ablation_report.write(report, folder)


def rows(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Every row with a finished run: its parameters, its training FLOPs per token, and its runs."""
    for variant in ROWS:
        model = variant.apply(config.model)
        found = (config.directory / variant.label).glob("seed_*")
        numbers = [re.fullmatch(r"seed_(\d+)", path.name) for path in found]
        seeds = sorted(int(number[1]) for number in numbers if number)
        runs = [finished(run_config(config, variant, seed)) for seed in seeds]
        if any(runs):
            yield {
                "label": variant.label,
                "parameters": count_parameters(model).total,
                "flops": 3 * sum(one.total for one in flops_by_loop(model, config.sequence_length)),
                "runs": [run for run in runs if run],
            }


def finished(config: RunConfig) -> dict[str, Any] | None:
    """A run's scores; None until it has trained its last step and been scored.

    Raises:
      InputError: its directory holds a run of another configuration, or of another number of steps,
        whose learning rates were different.
    """
    directory, last = config.directory, config.training.steps
    if not (directory / CONFIG).exists():
        return None  # another command may be creating it
    changes = check_directory(config)
    if longer := [change for change in changes if change.startswith("training.steps")]:
        raise InputError(
            f"{directory} was made with another config ({longer[0]}); choose another --run_dir"
        )
    evaluations = [row for row in read_metrics(directory) if "validation_loss" in row]
    if not evaluations or evaluations[-1]["step"] != last:
        return None
    run = {
        "seed": config.seed,
        "loss": evaluations[-1]["validation_loss"],
        "bits_per_byte": evaluations[-1]["bits_per_byte"],
        "validation_tokens": evaluations[-1]["validation_tokens"],
        "curve": [[row["step"], row["validation_loss"]] for row in evaluations],
    }
    task = config.data.synthetic
    if task.task != "none":
        if not (directory / EXACT_MATCH).exists():
            return None
        answers = json.loads((directory / EXACT_MATCH).read_text(encoding="utf-8"))
        tested = tuple(row["difficulty"] for row in answers["by_difficulty"])
        given = answers["step"], answers["limit"], tested
        if given != (last, TEST_PROBLEMS, task.test_difficulties):
            return None
        run["by_difficulty"] = answers["by_difficulty"]
    return run


def time_decoding(
    model: ModelConfig, variants: Sequence[Variant], batch: int, settings: DecodeSettings
) -> dict[str, Any]:
    """Every row's decode latency and cache size, at the end of the context."""
    print("timing decoding ...", flush=True)
    base = model.model_copy(update={"max_length": model.max_length + BLOCK})
    rows = prepare_all(variants, base)
    return Workload(base, batch, model.max_length, settings).measure(rows)


if __name__ == "__main__":
    run_command(main)
