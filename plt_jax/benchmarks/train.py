"""The speed and memory of training, scheme by scheme.

python -m plt_jax.benchmarks.train CONFIG --schemes no_loop,vanilla_loop,plt --loops 2

It times the train step of `plt_jax.train` on random tokens, one document per sequence. Every round
trains every scheme from a fresh state, and each round begins with another one. Figures are medians
over the rounds; ratios are medians of each round's own ratios. MFU counts the model's FLOPs
(model/costs.py), without those that rematerialisation repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.rounds import in_turn, positive_integers, ratios
from plt_jax.benchmarks.torch_peer import TorchLlama, training_llama
from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import RunConfig
from plt_jax.config.variants import NO_LOOP, Variant, variants_of
from plt_jax.distributed.chips import peak_flops
from plt_jax.distributed.mesh import make_mesh, use_mesh
from plt_jax.errors import InputError
from plt_jax.files.writing import write_text
from plt_jax.model.arithmetic import train_flops
from plt_jax.model.attention import choose_backend
from plt_jax.reports.tables import table_of
from plt_jax.training.guard import Limits
from plt_jax.training.objective import Batch
from plt_jax.training.program import TrainProgram

Report = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    arguments, config = parse(words)
    variants = variants_of(arguments.schemes, arguments.loops)
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
    peers: dict[str, TorchLlama] = {}
    try:
        if arguments.torch:
            for label, compiled in (("torch llama", False), ("torch llama, compiled", True)):
                peers[label] = training_llama(arguments.torch, config, compiled)
        steps = [CompiledStep.compile(variant, config, mesh) for variant in variants]
        timers: dict[str, Callable[[int], float]] = {
            **{step.variant.label: step.time_steps for step in steps},
            **{label: partial(time_peer, peer) for label, peer in peers.items()},
        }
        seconds: dict[str, list[float]] = {label: [] for label in timers}
        for index in range(arguments.rounds):
            for label in in_turn(timers, index):
                seconds[label].append(timers[label](arguments.steps))
            report["rows"] = [row(report, step, seconds) for step in steps]
            report["rows"] += [peer_row(report, *peer, seconds) for peer in peers.items()]
            if arguments.out:
                write_text(Path(arguments.out), json.dumps(report, indent=2) + "\n")
    finally:
        for peer in peers.values():
            peer.stop()
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
        type=positive_integers,
        default=[2],
        help="numbers of loops, for each scheme but no_loop",
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="steps timed in a round, after one that is not"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how many times each scheme is measured"
    )
    parser.add_argument(
        "--torch",
        nargs="?",
        const=sys.executable,
        help="also time the training of a Llama of the same shape in PyTorch's transformers, with "
        "this Python interpreter; default this one",
    )
    parser.add_argument("--out", help="JSON file for the figures")
    config = parse_run_config(parser, words)
    arguments = parser.parse_args(words)
    for name in ("steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.torch and config.model.moe.experts:
        raise InputError("--torch compares with a dense llama, but the config's model has experts")
    return arguments, config


def time_peer(peer: TorchLlama, steps: int) -> float:
    """Seconds per step of PyTorch; a first step is not timed."""
    peer(1)
    return peer(steps) / steps


class CompiledStep(NamedTuple):
    """A variant's compiled train step, with its program and a batch."""

    variant: Variant
    program: TrainProgram
    compiled: jax.stages.Compiled
    batch: Batch

    @classmethod
    def compile(cls, variant: Variant, config: RunConfig, mesh: jax.sharding.Mesh) -> CompiledStep:
        config = variant.apply_to_run(config)
        print(f"compiling {variant.label} ...", flush=True)
        program = TrainProgram.build(config, mesh)
        with use_mesh(mesh):
            lowered = program.jitted_step.lower(
                program.abstract_state, program.abstract_batch, Limits()
            )
        return cls(variant, program, lowered.compile(), random_batch(program))

    def time_steps(self, steps: int) -> float:
        """Seconds per step, from a fresh state; a first step is not timed.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        state = self.program.init_state()
        state, metrics = self.compiled(state, self.batch, Limits())
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = self.compiled(state, self.batch, Limits())
        jax.block_until_ready((state, metrics))
        taken = (time.perf_counter() - start) / steps
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"{self.variant.label}: the loss is {float(metrics['loss'])}")
        return taken


def random_batch(program: TrainProgram) -> Batch:
    """A batch of random tokens, in which every sequence is one document."""
    config, layout = program.config, program.batch_layout
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


def row(report: Report, step: CompiledStep, seconds: dict[str, list[float]]) -> Report:
    """One variant's figures."""
    flops = train_flops(step.program.config).model
    memory = step.compiled.memory_analysis()
    assert memory is not None  # every backend that trains reports it
    made: Report = {
        **timing(report, step.variant.label, seconds),
        "model_tflops": flops / 1e12,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
    }
    if report["peak_flops"]:
        peak = report["peak_flops"] * np.prod(list(report["mesh"].values()))
        made["mfu"] = float(1e3 * flops / made["ms"] / peak)
    vanilla = Variant("vanilla_loop", step.variant.loops).label
    if vanilla in seconds:
        made["ratio_to_vanilla"] = statistics.median(ratios(made["seconds"], seconds[vanilla]))
    return made


def peer_row(
    report: Report, label: str, peer: TorchLlama, seconds: dict[str, list[float]]
) -> Report:
    """The figures of one of PyTorch's processes."""
    return {**timing(report, label, seconds), **peer.about}


def timing(report: Report, label: str, seconds: dict[str, list[float]]) -> Report:
    """A row's label, times and speed, and the median of its rounds' ratios to no_loop."""
    own = seconds[label]
    tokens, median = report["batch_size"] * report["sequence_length"], statistics.median(own)
    made: Report = {
        "label": label,
        "seconds": own,
        "ms": 1e3 * median,
        "range": f"({1e3 * min(own):.1f}-{1e3 * max(own):.1f})",
        "tokens_per_second": tokens / median,
    }
    if NO_LOOP.label in seconds:
        made["ratio_to_no_loop"] = statistics.median(ratios(own, seconds[NO_LOOP.label]))
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
    """The line above the table: the model, the batch and the machine."""
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
