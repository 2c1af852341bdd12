"""The speed and memory of training, scheme by scheme.

python -m plt_jax.benchmarks.train CONFIG --schemes no_loop,vanilla_loop,plt --loops 2

The real train step on random tokens, one document a sequence. Every round trains every scheme in
turn, from a fresh state, beginning with another one each time; figures are medians over the rounds,
and ratios are medians of each round's own ratios. MFU counts the model's own arithmetic, loop by
loop (model/costs.py), not what the backward pass computes again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from plt_jax.benchmarks.decode import Case, all_cases, with_scheme
from plt_jax.benchmarks.machine import machine
from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import SCHEMES, RunConfig
from plt_jax.distributed.chips import peak_flops
from plt_jax.distributed.mesh import make_mesh, use_mesh
from plt_jax.errors import InputError
from plt_jax.files import write_text
from plt_jax.model.arithmetic import train_flops
from plt_jax.model.attention import choose_backend
from plt_jax.reports.tables import table_of
from plt_jax.training.guard import Limits
from plt_jax.training.step import (
    Batch,
    abstract_batch,
    abstract_state,
    init_state,
    jit_train_step,
    training_layout,
)

Report = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    arguments, config = parse(words)
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh):
        attention = choose_backend(config.model)
    report: Report = {
        "command": " ".join(["python -m plt_jax.benchmarks.train", *words]),
        "machine": machine(),
        "mesh": dict(mesh.shape),
        "attention": attention,
        "peak_flops": peak_flops(jax.devices()[0].device_kind),
        "model": config.model.model_dump(mode="json", exclude={"loop"}),
        "batch_size": config.training.batch_size,
        "accumulate": config.training.accumulate,
        "sequence_length": config.sequence_length,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "rows": [],
    }
    print(heading(report), flush=True)
    runs = [
        Run.compiled(case, config, mesh) for case in all_cases(arguments.schemes, arguments.loops)
    ]
    seconds: dict[Case, list[float]] = {run.case: [] for run in runs}
    for index in range(arguments.rounds):
        for run in runs[index % len(runs) :] + runs[: index % len(runs)]:
            seconds[run.case].append(run.time_steps(arguments.steps))
        report["rows"] = [row(report, run, seconds) for run in runs]
        if arguments.out:
            write_text(Path(arguments.out), json.dumps(report, indent=2) + "\n")
    print(table_of(COLUMNS, report["rows"]))


def parse(words: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = CommandParser(
        prog="python -m plt_jax.benchmarks.train",
        description="Measure training throughput and memory of looping schemes.",
    )
    parser.add_argument(
        "--schemes",
        type=lambda text: text.split(","),
        default=["no_loop", "vanilla_loop", "plt"],
        help="looping schemes",
    )
    parser.add_argument(
        "--loops",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[2],
        help="loops of each but no_loop",
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="steps a round, behind one that is not"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that each scheme is measured")
    parser.add_argument("--out", help="file for the figures, JSON")
    config = parse_run_config(parser, words)
    arguments = parser.parse_args(words)
    if unknown := [name for name in arguments.schemes if name not in SCHEMES]:
        raise InputError(f"no scheme {unknown[0]}; known are {', '.join(SCHEMES)}")
    for name in ("steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if min(arguments.loops) < 1:
        raise InputError(f"--loops holds {min(arguments.loops)}; it must be at least 1")
    return arguments, config


class Run(NamedTuple):
    """One scheme's compiled step, and what it needs."""

    case: Case
    config: RunConfig
    mesh: jax.sharding.Mesh
    step: jax.stages.Compiled
    batch: Batch

    @classmethod
    def compiled(cls, case: Case, config: RunConfig, mesh: jax.sharding.Mesh) -> Run:
        config = config.model_copy(update={"model": with_scheme(config.model, case)})
        print(f"compiling {case.label} ...", flush=True)
        with use_mesh(mesh):
            lowered = jit_train_step(config, mesh).lower(
                abstract_state(config, mesh), abstract_batch(config, mesh), Limits()
            )
        return cls(case, config, mesh, lowered.compile(), random_batch(config, mesh))

    def time_steps(self, steps: int) -> float:
        """Seconds of a step, from a fresh state, the first not counted."""
        state = init_state(self.config, self.mesh)
        state, metrics = self.step(state, self.batch, Limits())
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = self.step(state, self.batch, Limits())
        jax.block_until_ready((state, metrics))
        taken = (time.perf_counter() - start) / steps
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"{self.case.label}: the loss is {float(metrics['loss'])}")
        return taken


def random_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> Batch:
    """Random tokens, every sequence one document."""
    layout = training_layout(config, mesh)
    shape = len(layout.rows), config.sequence_length
    random = np.random.default_rng(config.seed)
    tokens = random.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    return layout.place(
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.ones(shape, np.int32),
            "weights": np.ones(shape, np.float32),
        }
    )


def row(report: Report, run: Run, seconds: dict[Case, list[float]]) -> Report:
    """One scheme's figures."""
    own, T = seconds[run.case], report["sequence_length"]
    tokens, median = report["batch_size"] * T, statistics.median(own)
    flops = train_flops(run.config).model
    memory = run.step.memory_analysis()
    made: Report = {
        "label": run.case.label,
        "seconds": own,
        "ms": 1e3 * median,
        "range": f"({1e3 * min(own):.1f}-{1e3 * max(own):.1f})",
        "tokens_per_second": tokens / median,
        "model_tflops": flops / 1e12,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
    }
    if report["peak_flops"]:
        peak = report["peak_flops"] * np.prod(list(report["mesh"].values()))
        made["mfu"] = float(flops / median / peak)
    for name, other in (
        ("ratio_to_no_loop", Case("no_loop", 1)),
        ("ratio_to_vanilla", Case("vanilla_loop", run.case.loops)),
    ):
        if other in seconds and len(seconds[other]) == len(own):
            ratios = [one / two for one, two in zip(own, seconds[other], strict=True)]
            made[name] = statistics.median(ratios)
    return made


COLUMNS = (
    ("ms", "ms/step", "{:.1f}"),
    ("range", "(range)", "{}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("ratio_to_no_loop", "x no_loop", "{:.3f}"),
    ("ratio_to_vanilla", "x vanilla", "{:.3f}"),
    ("model_tflops", "TFLOPs", "{:.3f}"),
    ("state_gb", "state GB", "{:.2f}"),
    ("temporaries_gb", "temporaries GB", "{:.2f}"),
)


def heading(report: Report) -> str:
    """What is measured, on what."""
    about, model = report["machine"], report["model"]
    return (
        f"{model['layers']} layers of width {model['width']}, {model['dtype']}, remat "
        f"{model['remat']}, attention {report['attention']}; {report['batch_size']} sequences of "
        f"{report['sequence_length']} in {report['accumulate']} micro-batches; {about['device']} "
        f"({about['processor']}, {about['cores']} cores), Python {about['python']}, jax "
        f"{about['jax']}"
    )


if __name__ == "__main__":
    run_command(main)
