"""The speed and memory of decoding, scheme by scheme.

python -m plt_jax.benchmarks.decode CONFIG --batch 1,4 --context 1024 --schemes no_loop,plt

Every round measures every scheme once, and each round begins with another one, so that a change of
the machine's speed affects all of them. Figures are medians over the rounds; ratios are medians of
each round's own ratios. What is timed is the loop of greedy generation on the device, at the end of
a context whose keys and values are random.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.benchmarks import decode_report
from plt_jax.benchmarks.machine import copy_bandwidth, machine
from plt_jax.benchmarks.prepared import PreparedVariant, add_weights, prepare_all
from plt_jax.benchmarks.rounds import interleave, positive_integers, ratios, spread
from plt_jax.benchmarks.torch_peer import TorchLlama, decoding_llama
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import ModelConfig, MoEConfig
from plt_jax.config.model import PARTS
from plt_jax.config.variants import NO_LOOP, variants_of
from plt_jax.decoding.cache import Cache, init_cache
from plt_jax.decoding.early_exit import ExitRule
from plt_jax.decoding.generation import (
    BLOCK,
    EarlyExits,
    GenerationState,
    TokenChoice,
    advance,
    prefill_prompts,
)
from plt_jax.decoding.options import DTYPES
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.weights import EXPERT_AXES, DecodeWeights
from plt_jax.errors import InputError
from plt_jax.model.costs import count_parameters
from plt_jax.runs.configuration import load_config


class DecodeSettings(NamedTuple):
    """How a workload is measured; the fields are options of the command."""

    tokens: int = 16
    rounds: int = 9
    prompt: int = 0
    cache_dtype: str | None = None
    torch: str | None = None


def main() -> None:
    arguments = parse()
    base = base_config(arguments)
    variants = variants_of(arguments.schemes, arguments.loops, arguments.looped_layers)
    rows = prepare_all(variants, base, arguments.weights)
    settings = DecodeSettings(**{name: getattr(arguments, name) for name in DecodeSettings._fields})
    report = {
        "command": " ".join(["python -m plt_jax.benchmarks.decode", *sys.argv[1:]]),
        "machine": machine(),
        "copy_gb_per_second": copy_bandwidth() / 1e9,
        "model": base.model_dump(mode="json", exclude={"max_length"}),
        "parameters": count_parameters(NO_LOOP.apply(base)).total,
        "dtype": base.dtype,
        "cache_dtype": arguments.cache_dtype or base.dtype,
        "weights": [name or base.dtype for name in arguments.weights],
        "tokens": arguments.tokens,
        "cells": [],
    }
    print(decode_report.heading(report), flush=True)
    for context, batch in itertools.product(arguments.context, arguments.batch):
        workload = Workload(base, batch, context, settings)
        report["cells"].append(workload.measure(rows))
        print(decode_report.table(report, report["cells"][-1]), flush=True)
        if arguments.out:
            decode_report.write(report, Path(arguments.out))


def parse() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m plt_jax.benchmarks.decode",
        description="Measure the latency, memory traffic and cache size of decoding.",
    )
    parser.add_argument("config", help="YAML file, whose model is measured with every scheme")
    parser.add_argument(
        "--batch", type=positive_integers, default=[1], help="batch sizes, such as 1,4,16"
    )
    parser.add_argument(
        "--context",
        type=positive_integers,
        default=[1024],
        help="tokens in the cache before the timed steps",
    )
    parser.add_argument(
        "--schemes",
        type=lambda text: text.split(","),
        default=["no_loop", "vanilla_loop", "clp", "clp_kv_share", "plt"],
        help="looping schemes",
    )
    parser.add_argument(
        "--loops",
        type=positive_integers,
        default=[2, 3],
        help="numbers of loops, for each scheme but no_loop",
    )
    parser.add_argument(
        "--looped_layers",
        type=layer_range,
        help="also measure each scheme with loops over some layers alone, such as 4-7, from 0",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute dtype; default the config's"
    )
    parser.add_argument(
        "--cache_dtype", choices=DTYPES, help="dtype of keys and values; default the compute dtype"
    )
    add_weights(parser)
    parser.add_argument(
        "--decode_attention",
        choices=get_args(ModelConfig.model_fields["decode_attention"].annotation),
        help="kernel of the step's attention; default the config's",
    )
    defaults = DecodeSettings()
    parser.add_argument(
        "--tokens",
        type=int,
        default=defaults.tokens,
        help=f"tokens timed in a round, below {BLOCK}",
    )
    parser.add_argument(
        "--rounds", type=int, default=defaults.rounds, help="how many times each scheme is measured"
    )
    parser.add_argument(
        "--prompt",
        type=int,
        default=defaults.prompt,
        help="tokens of the prompt whose prefill is timed; 0: prefill is not timed",
    )
    parser.add_argument(
        "--torch",
        nargs="?",
        const=sys.executable,
        help="also time a Llama of the same shape in PyTorch's transformers, with this Python "
        "interpreter; default this one",
    )
    parser.add_argument("--out", help="folder for decode.json, decode.txt and the plots")
    arguments = parser.parse_args()
    if not 1 <= arguments.tokens < BLOCK:
        raise InputError(f"--tokens is {arguments.tokens}; it must be 1 to {BLOCK - 1}")
    if arguments.rounds < 1:
        raise InputError(f"--rounds is {arguments.rounds}; it must be at least 1")
    return arguments


def layer_range(text: str) -> tuple[int, int]:
    """The first and the last layer of `4-7`."""
    first, _, last = text.partition("-")
    return int(first), int(last)


def base_config(arguments: argparse.Namespace) -> ModelConfig:
    """The config's model, with room for the longest context."""
    model = load_config(arguments.config).model
    if arguments.torch and model.moe.experts:
        raise InputError("--torch compares with a dense llama, but the config's model has experts")
    room = max(*arguments.context, arguments.prompt) + BLOCK
    settings = model.model_dump() | {"max_length": room}
    chosen = {name: getattr(arguments, name) for name in ("dtype", "decode_attention")}
    return ModelConfig(**settings | {name: value for name, value in chosen.items() if value})


class Workload:
    """A batch size and a context, at which all variants are measured."""

    def __init__(
        self,
        base: ModelConfig,
        batch: int,
        context: int,
        settings: DecodeSettings,
    ):
        self.base, self.batch, self.context = base, batch, context
        self.settings = settings
        self.capacity = context + BLOCK

    def measure(self, rows: Sequence[PreparedVariant]) -> dict[str, Any]:
        """The figures of all variants, and of PyTorch where it is asked for."""
        timers: dict[str, Callable[[], float]] = {
            row.label: functools.partial(self.decode_seconds, row) for row in rows
        }
        prefills = {row.label: functools.partial(self.prefill_seconds, row) for row in rows}
        peers = self.start_peers()
        timers |= {name: lambda peer=peer: peer(self.settings.tokens) for name, peer in peers}
        try:
            decode = interleave(timers, self.settings.rounds)
        finally:
            for _, peer in peers:
                peer.stop()
        prefill = interleave(prefills, self.settings.rounds) if self.settings.prompt else {}
        return {
            "batch": self.batch,
            "context": self.context,
            "capacity": self.capacity,
            "prompt": self.settings.prompt,
            "rows": [self.figures(row, decode, prefill) for row in rows],
            "peers": [
                {"label": name, **peer.about, **self.timing(name, decode)} for name, peer in peers
            ],
        }

    def start_peers(self) -> list[tuple[str, TorchLlama]]:
        if not self.settings.torch:
            return []
        return [
            (
                name,
                decoding_llama(self.settings.torch, self.base, self.batch, self.context, compiled),
            )
            for name, compiled in (("torch llama", False), ("torch llama, compiled", True))
        ]

    def timing(self, label: str, decode: dict[str, list[float]]) -> dict[str, Any]:
        """Milliseconds per token, also by round, and ratios to no_loop if that is measured."""
        ms = [1e3 * seconds / self.settings.tokens for seconds in decode[label]]
        figures: dict[str, Any] = {**spread("ms", ms), "rounds_ms": ms}
        figures["tokens_per_second"] = self.batch * 1e3 / figures["ms"]
        if "no_loop" in decode:
            figures |= spread("ratio_to_no_loop", ratios(decode[label], decode["no_loop"]))
        return figures

    def figures(
        self,
        row: PreparedVariant,
        decode: dict[str, list[float]],
        prefill: dict[str, list[float]],
    ) -> dict[str, Any]:
        """All figures of one variant."""
        label, vanilla = row.label, f"vanilla_loop-{row.variant.loops}"
        shape = jax.eval_shape(lambda: self.cache(row.config))
        moved = bytes_moved(row.config, row.weights, shape)
        figures = {
            "label": label,
            "scheme": row.scheme,
            "loops": row.variant.loops,
            "cache_bytes": nbytes(shape),
            "kv_bytes": nbytes((shape.keys, shape.values)),
            **moved,
            **self.timing(label, decode),
        }
        figures["gb_per_second"] = sum(moved.values()) / figures["ms"] / 1e6
        if vanilla in decode:
            figures |= spread("ratio_to_vanilla", ratios(decode[label], decode[vanilla]))
        if prefill:
            first = spread("first_token_ms", [1e3 * seconds for seconds in prefill[label]])
            tokens = self.batch * self.settings.prompt
            figures |= first | {"prefill_tokens_per_second": 1e3 * tokens / first["first_token_ms"]}
        return figures

    def cache(self, config: ModelConfig) -> Cache:
        """A cache of random keys and values, whose lengths are the context.

        Memory that was never written may not be allocated yet, and would be read too fast.
        """
        cache = init_cache(config, self.batch, self.capacity, self.settings.cache_dtype)
        lengths = jnp.full_like(cache.lengths, self.context)
        return fill_with_noise(cache).replace(lengths=lengths)

    def decode_seconds(self, row: PreparedVariant, rule: ExitRule | None = None) -> float:
        """Seconds of `tokens` decode steps, after one step that is not timed.

        Args:
          rule: where tokens stop their loops; default none, all loops run.
        """
        state = GenerationState(
            self.cache(row.config),
            # Different tokens, or all sequences would choose the same experts.
            jnp.arange(self.batch, dtype=jnp.int32) % row.config.vocab_size,
            jnp.ones(self.batch, bool),
            jnp.int32(0),
            None if rule is None else EarlyExits.by(rule),
        )
        keys_B = jax.random.split(jax.random.key(0), self.batch)
        run = functools.partial(
            advance,
            row.config,
            TokenChoice(Sampling()),
            row.weights,
            keys_B,
            np.full((self.batch, 1), -1),
        )
        state, _, _ = jax.block_until_ready(run(state, 1))
        start = time.perf_counter()
        jax.block_until_ready(run(state, self.settings.tokens))
        return time.perf_counter() - start

    def prefill_seconds(self, row: PreparedVariant) -> float:
        """Seconds from the prompts to the first token's logits."""
        prompts = np.arange(self.batch * self.settings.prompt) % row.config.vocab_size
        prompts = prompts.reshape(self.batch, -1).tolist()
        capacity = self.settings.prompt + BLOCK
        cache = init_cache(row.config, self.batch, capacity, self.settings.cache_dtype)
        jax.block_until_ready(cache)
        start = time.perf_counter()
        jax.block_until_ready(prefill_prompts(row.config, row.weights, prompts, cache))
        return time.perf_counter() - start


@functools.partial(jax.jit, donate_argnums=0)
def fill_with_noise(cache: Cache) -> Cache:
    def noise(array: jax.Array) -> jax.Array:
        values = jax.random.uniform(jax.random.key(0), array.shape, minval=-1.0, maxval=1.0)
        scale = 127 if array.dtype == jnp.int8 else 1
        return (scale * values).astype(array.dtype)

    return jax.tree.map(noise, cache)


def bytes_moved(config: ModelConfig, weights: DecodeWeights, cache: Cache) -> dict[str, int]:
    """Bytes that a decode step reads: weights (once per pass), and keys and values.

    A step reads the experts that any row chose. Their expected number is counted, for choices that
    are uniform and independent.
    """
    head = weights.embedding if weights.head is None else weights.head
    layers = slots = 0
    for part in PARTS:
        loop = config.of_part(part).loop
        passes = 1 if loop.shifted else loop.count
        held = [weights.layers[j] for j in config.layers_in(part)]
        untouched = _untouched(config.moe, held, cache, loop.count // passes)
        layers += passes * (nbytes(held) - untouched)
        kept = nbytes([(cache.keys[j], cache.values[j]) for j in config.layers_in(part)])
        # A serial scheme reads all slots in every loop.
        slots += kept if loop.later_attention == "own" else passes * kept
    return {"weight_bytes_read": layers + nbytes(head), "cache_bytes_read": slots}


def _untouched(moe: MoEConfig, layers: list[Any], cache: Cache, rows: int) -> int:
    """Expected bytes of the experts that no row of a pass chooses.

    Args:
      rows: the number of rows of a sequence.
    """
    mixtures = [layer for layer in layers if "router" in layer]
    if not mixtures:
        return 0
    experts = nbytes([[layer[name] for name in EXPERT_AXES] for layer in mixtures])
    choices = cache.lengths.shape[0] * rows
    return round((1 - moe.experts_per_token / moe.experts) ** choices * experts)


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    run_command(main)
