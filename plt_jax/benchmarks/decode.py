"""The speed and memory of decoding, scheme by scheme.

python -m plt_jax.benchmarks.decode CONFIG --batch 1,4 --context 1024 --schemes no_loop,plt

Every round measures every scheme in turn, so that all meet the same moods of the machine; figures
are medians over the rounds, and ratios are medians of each round's own ratios. What is timed is
greedy generation's own loop on the device, at the end of a context whose keys and values are noise.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.benchmarks import decode_report
from plt_jax.benchmarks.machine import copy_bandwidth, machine
from plt_jax.benchmarks.torch_peer import TorchLlama
from plt_jax.cli import CommandParser, run_command
from plt_jax.config import SCHEMES, ModelConfig
from plt_jax.config_file import load_config
from plt_jax.decoding.cache import Cache, init_cache
from plt_jax.decoding.generation import BLOCK, GenerationState, advance, prefill_prompts
from plt_jax.decoding.layout import Params, prepare_for_decode
from plt_jax.decoding.sampling import Sampling
from plt_jax.errors import InputError
from plt_jax.model.attention import gate_parameters
from plt_jax.model.transformer import Transformer


class Case(NamedTuple):
    """One scheme with its number of loops."""

    scheme: str
    loops: int

    @property
    def label(self) -> str:
        return self.scheme if self.scheme == "no_loop" else f"{self.scheme}-{self.loops}"


def main() -> None:
    arguments = parse()
    base = base_config(arguments)
    cases = list(all_cases(arguments.schemes, arguments.loops))
    weights = random_weights(base)
    report = {
        "command": " ".join(["python -m plt_jax.benchmarks.decode", *sys.argv[1:]]),
        "machine": machine(),
        "copy_gb_per_second": copy_bandwidth() / 1e9,
        "model": base.model_dump(mode="json", exclude={"loop", "max_length"}),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "dtype": base.dtype,
        "cache_dtype": arguments.cache_dtype or base.dtype,
        "tokens": arguments.tokens,
        "cells": [],
    }
    print(decode_report.heading(report), flush=True)
    for context, batch in itertools.product(arguments.context, arguments.batch):
        cell = Cell(base, weights, batch, context, arguments)
        report["cells"].append(cell.measure(cases))
        print(decode_report.table(report["cells"][-1]), flush=True)
        if arguments.out:
            decode_report.write(report, Path(arguments.out))


def parse() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m plt_jax.benchmarks.decode",
        description="Measure the latency, memory traffic and cache size of decoding.",
    )
    parser.add_argument("config", help="YAML file; its model's shape is measured in every scheme")
    parser.add_argument("--batch", type=numbers, default=[1], help="sequences, as 1,4,16")
    parser.add_argument("--context", type=numbers, default=[1024], help="tokens already decoded")
    parser.add_argument(
        "--schemes",
        type=lambda text: text.split(","),
        default=["no_loop", "vanilla_loop", "clp", "clp_kv_share", "plt"],
        help="looping schemes",
    )
    parser.add_argument("--loops", type=numbers, default=[2, 3], help="loops of each but no_loop")
    parser.add_argument("--dtype", help="float32 or bfloat16; default the config's")
    parser.add_argument("--cache_dtype", help="float32, bfloat16 or int8; default the dtype")
    parser.add_argument("--tokens", type=int, default=16, help=f"tokens a round, below {BLOCK}")
    parser.add_argument("--rounds", type=int, default=9, help="times that each scheme is measured")
    parser.add_argument(
        "--prompt", type=int, default=0, help="prompt to time prefill with; 0: none"
    )
    parser.add_argument(
        "--torch",
        nargs="?",
        const=sys.executable,
        help="also time transformers' llama of the same shape; optionally the Python that has it",
    )
    parser.add_argument("--out", help="folder for decode.json and the plots")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.schemes if name not in SCHEMES]:
        raise InputError(f"no scheme {unknown[0]}; known are {', '.join(SCHEMES)}")
    if not 1 <= arguments.tokens < BLOCK:
        raise InputError(f"--tokens is {arguments.tokens}; it must be 1 to {BLOCK - 1}")
    if arguments.rounds < 1:
        raise InputError(f"--rounds is {arguments.rounds}; it must be at least 1")
    return arguments


def numbers(text: str) -> list[int]:
    """Positive whole numbers, separated by commas."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text} holds a number below 1")
    return values


def base_config(arguments: argparse.Namespace) -> ModelConfig:
    """The config's model without loops, with room for the longest context."""
    model = load_config(arguments.config).model.model_dump()
    room = max(*arguments.context, arguments.prompt) + BLOCK
    model |= {"loop": {"scheme": "no_loop"}, "max_length": room}
    try:
        return ModelConfig(**model | ({"dtype": arguments.dtype} if arguments.dtype else {}))
    except ValueError as error:
        raise InputError(f"--dtype: {error}") from error


def all_cases(schemes: list[str], loops: list[int]) -> Iterator[Case]:
    for scheme in schemes:
        for count in [1] if scheme == "no_loop" else loops:
            yield Case(scheme, count)


def random_weights(config: ModelConfig) -> Params:
    """Prepared parameters of the model without loops, as initialised."""
    init = jax.jit(Transformer(config).init)
    declared = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.block_until_ready(prepare_for_decode(config, declared))


def with_gates(config: ModelConfig, weights: Params) -> Params:
    """The same arrays with a scheme's gates, so that all schemes share the rest."""
    if config.loop.later_attention != "gated":
        return weights
    gates = {name: jnp.zeros(gate.shape) for name, gate in gate_parameters(config).items()}
    return weights | {"layers": tuple(layer | gates for layer in weights["layers"])}


class Cell:
    """All schemes at one batch size and context."""

    def __init__(
        self,
        base: ModelConfig,
        weights: Params,
        batch: int,
        context: int,
        arguments: argparse.Namespace,
    ):
        self.base, self.weights, self.batch, self.context = base, weights, batch, context
        self.arguments = arguments
        self.capacity = context + BLOCK

    def measure(self, cases: list[Case]) -> dict[str, Any]:
        """Medians of all cases, and the peer's."""
        rows = [Row(case, self.config(case)) for case in cases]
        timers: dict[str, Callable[[], float]] = {
            row.case.label: functools.partial(self.decode_seconds, row) for row in rows
        }
        prefills = {row.case.label: functools.partial(self.prefill_seconds, row) for row in rows}
        peers = self.start_peers()
        timers |= {name: lambda peer=peer: peer(self.arguments.tokens) for name, peer in peers}
        decode = interleave(timers, self.arguments.rounds)
        for _, peer in peers:
            peer.stop()
        prefill = interleave(prefills, 3) if self.arguments.prompt else {}
        return {
            "batch": self.batch,
            "context": self.context,
            "capacity": self.capacity,
            "prompt": self.arguments.prompt,
            "rows": [row.report(self, decode, prefill) for row in rows],
            "peers": [
                {"label": name, **peer.about, **spread(decode[name], self.arguments.tokens)}
                for name, peer in peers
            ],
        }

    def config(self, case: Case) -> ModelConfig:
        loop = {"scheme": case.scheme, "count": case.loops}
        return ModelConfig(**self.base.model_dump() | {"loop": loop})

    def start_peers(self) -> list[tuple[str, TorchLlama]]:
        if not self.arguments.torch:
            return []
        return [
            (name, TorchLlama(self.arguments.torch, self.base, self.batch, self.context, compiled))
            for name, compiled in (("torch llama", False), ("torch llama, compiled", True))
        ]

    def cache(self, config: ModelConfig) -> Cache:
        """Full of noise up to the context: memory that nobody wrote may not be there at all."""
        cache = init_cache(config, self.batch, self.capacity, self.arguments.cache_dtype)
        lengths = jnp.full_like(cache.lengths, self.context)
        return fill_with_noise(cache).replace(lengths=lengths)

    def decode_seconds(self, row: Row) -> float:
        """Seconds of `tokens` decode steps, after one that does not count."""
        state = GenerationState(
            self.cache(row.config),
            jnp.zeros(self.batch, jnp.int32),
            jnp.ones(self.batch, bool),
            jnp.int32(0),
        )
        weights = with_gates(row.config, self.weights)
        keys_B = jax.random.split(jax.random.key(0), self.batch)
        run = functools.partial(
            advance, row.config, Sampling(), weights, keys_B, np.full((self.batch, 1), -1)
        )
        state, _, _ = jax.block_until_ready(run(state, 1))
        start = time.perf_counter()
        jax.block_until_ready(run(state, self.arguments.tokens))
        return time.perf_counter() - start

    def prefill_seconds(self, row: Row) -> float:
        """Seconds from the prompts to the first token's logits."""
        prompts = [[1] * self.arguments.prompt] * self.batch
        cache = init_cache(row.config, self.batch, self.capacity, self.arguments.cache_dtype)
        weights = with_gates(row.config, self.weights)
        jax.block_until_ready(cache)
        start = time.perf_counter()
        jax.block_until_ready(prefill_prompts(row.config, weights, prompts, cache))
        return time.perf_counter() - start


@functools.partial(jax.jit, donate_argnums=0)
def fill_with_noise(cache: Cache) -> Cache:
    def noise(array: jax.Array) -> jax.Array:
        values = jax.random.uniform(jax.random.key(0), array.shape, minval=-1.0, maxval=1.0)
        scale = 127 if array.dtype == jnp.int8 else 1
        return (scale * values).astype(array.dtype)

    return jax.tree.map(noise, cache)


class Row(NamedTuple):
    """One case in a cell."""

    case: Case
    config: ModelConfig

    def report(
        self, cell: Cell, decode: dict[str, list[float]], prefill: dict[str, list[float]]
    ) -> dict[str, Any]:
        label, tokens = self.case.label, cell.arguments.tokens
        shape = jax.eval_shape(lambda: cell.cache(self.config))
        moved = bytes_moved(self.config, with_gates(self.config, cell.weights), shape)
        figures = {
            "label": label,
            "scheme": self.case.scheme,
            "loops": self.case.loops,
            "cache_bytes": nbytes(shape),
            "kv_bytes": nbytes((shape.keys, shape.values, shape.ring_keys, shape.ring_values)),
            **moved,
            **spread(decode[label], tokens),
        }
        figures["tokens_per_second"] = cell.batch * 1e3 / figures["ms"]
        figures["gb_per_second"] = sum(moved.values()) / figures["ms"] / 1e6
        for name, other in (("no_loop", "no_loop"), ("vanilla", f"vanilla_loop-{self.case.loops}")):
            if other in decode:
                ratios = [a / b for a, b in zip(decode[label], decode[other], strict=True)]
                figures[f"ratio_to_{name}"] = statistics.median(ratios)
        if prefill:
            seconds = statistics.median(prefill[label])
            figures["first_token_ms"] = 1e3 * seconds
            figures["prefill_tokens_per_second"] = cell.batch * cell.arguments.prompt / seconds
        return figures


def interleave(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round, after one that warms up and does not count."""
    for timer in timers.values():
        timer()
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer())
    return seconds


def spread(seconds: list[float], tokens: int) -> dict[str, float]:
    """Milliseconds per token: median, fastest and slowest round."""
    per_token = [1e3 * one / tokens for one in seconds]
    return {
        "ms": statistics.median(per_token),
        "ms_min": min(per_token),
        "ms_max": max(per_token),
    }


def bytes_moved(config: ModelConfig, weights: Params, cache: Cache) -> dict[str, int]:
    """Bytes that a decode step must read: weights, once per pass, and keys and values.

    Of routed experts it counts all, which is too much where few are chosen.
    """
    loop = config.loop
    passes = 1 if loop.shifted else loop.count
    head = weights.get("head", weights["embedding"])
    full = nbytes((cache.keys, cache.values))
    if loop.later_attention != "own":
        full *= passes  # a serial scheme reads the shared cache in every loop
    rings = nbytes((cache.ring_keys, cache.ring_values))
    return {
        "weight_bytes_read": passes * nbytes(weights["layers"]) + nbytes(head),
        "cache_bytes_read": full + rings,
    }


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    run_command(main)
