"""The costs of a model, counted from its configuration: parameters, arithmetic, cache."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.config.model import PARTS, Part
from plt_jax.model.block import block_parameters, stacks_in, stacks_of
from plt_jax.model.layers import Parameter
from plt_jax.model.moe import EXPERTS
from plt_jax.model.transformer import top_parameters


class ParameterCount(NamedTuple):
    """Numbers of parameters of a model."""

    total: int
    active: int
    """Parameters that work on one token: all but the experts that it does not choose."""
    embeddings: int
    """Parameters of the embedding and, where it is not tied, the head."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model; loops use the same ones again."""
    top = top_parameters(config)
    total = sum(math.prod(parameter.shape) for parameter in top.values())
    active = total
    for stack in stacks_of(config).values():
        for name, parameter in block_parameters(config, stack).items():
            total += stack.layers * math.prod(parameter.shape)
            active += stack.layers * _active(config, name, parameter)
    embeddings = sum(math.prod(top[name].shape) for name in ("embedding", "head") if name in top)
    return ParameterCount(total, active, embeddings)


def _active(config: ModelConfig, name: str, parameter: Parameter) -> int:
    """The number of elements of a layer's parameter that work on one token."""
    size = math.prod(parameter.shape)
    if name in EXPERTS:
        return size * config.moe.experts_per_token // config.moe.experts
    return size


class LoopFlops(NamedTuple):
    """Floating-point operations of one loop's forward pass, per token; a product-sum counts two.

    The layers before the loops are counted in the first one, and those behind them in the last.
    """

    layers: int
    """Products with the layers' weights."""
    attention: int
    """Products of queries with keys, and of weights with values."""
    head: int
    """Product with the output head, in the last loop alone."""

    @property
    def total(self) -> int:
        return sum(self)


def parts_of_loop(config: ModelConfig, index: int) -> list[Part]:
    """The parts whose layers are counted in a loop (0 for the first)."""
    first, last = index == 0, index == config.loop.count - 1
    return [part for part in PARTS if part == "core" or (first if part == "prelude" else last)]


def layers_of_loop(config: ModelConfig, index: int) -> int:
    """The number of layers that are counted in a loop (0 for the first)."""
    return sum(len(config.layers_in(part)) for part in parts_of_loop(config, index))


def describe_loops(config: ModelConfig) -> str:
    """The looping in words, such as `plt, 2 loops through layers 4 to 7 of 12`."""
    loops = "one loop" if config.loop.count == 1 else f"{config.loop.count} loops"
    layers = config.looped_layers
    first, last = layers[0], layers[-1]
    if len(layers) == config.layers:
        where = "one layer" if config.layers == 1 else f"{config.layers} layers"
    else:
        some = f"layer {first}" if first == last else f"layers {first} to {last}"
        where = f"{some} of {config.layers} (from 0)"
    return f"{config.loop.scheme}, {loops} through {where}"


def flops_by_loop(config: ModelConfig, length: int) -> list[LoopFlops]:
    """Forward FLOPs of sequences of one document, loop by loop; training costs three times.

    They are counted here, since XLA's cost analysis counts the body of a scan once, and the rule
    6·N·D counts the weights of a looped model once.

    Args:
      length: tokens per sequence. A position attends to itself and all before it, on average half.
    """
    loop, gates = config.loop, 0
    products: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for stack in stacks_of(config).values():
        for name, parameter in block_parameters(config, stack).items():
            size = stack.layers * _active(config, name, parameter)
            if name == "gate_weight":
                gates += size
            elif parameter.decays:
                products[stack.part] += size
    looped = len(config.looped_layers)
    keys_values = 2 * looped * config.width * config.kv_heads * config.head_width
    keys = (length + 1) / 2
    window = min(loop.window, length)
    # Fewer keys at the start, until the window is full.
    keys_in_window = window - window * (window - 1) / (2 * length)
    per_key = 4 * config.heads * config.head_width
    costs = []
    for index in range(loop.count):
        gated = index > 0 and loop.later_attention == "gated"
        last = index == loop.count - 1
        # Loops that attend to loop 1's keys and values alone compute none of their own.
        unmade = index > 0 and loop.later_attention == "shared"
        weights = sum(products[part] for part in parts_of_loop(config, index))
        all_keys = layers_of_loop(config, index) * keys + (looped * keys_in_window if gated else 0)
        costs.append(
            LoopFlops(
                layers=2 * (weights + (gates if gated else 0) - (keys_values if unmade else 0)),
                attention=round(per_key * all_keys),
                head=2 * config.width * config.vocab_size if last else 0,
            )
        )
    return costs


def readout_flops(config: ModelConfig, length: int) -> LoopFlops:
    """Forward FLOPs per token of reading a loop out that is not the last: the coda and the head."""
    products = 0
    for stack in stacks_in(config, "coda").values():
        for name, parameter in block_parameters(config, stack).items():
            if parameter.decays:
                products += stack.layers * _active(config, name, parameter)
    keys = len(config.layers_in("coda")) * (length + 1) / 2
    return LoopFlops(
        layers=2 * products,
        attention=round(4 * config.heads * config.head_width * keys),
        head=2 * config.width * config.vocab_size,
    )


class CacheBytes(NamedTuple):
    """Bytes that decoding keeps for a sequence."""

    per_token: int
    """Keys and values that grow with the context."""
    windows: int
    """Keys and values of the later loops' last W tokens, in a context of at least W."""


def cache_bytes(config: ModelConfig) -> CacheBytes:
    """Bytes of keys and values per sequence, in the compute dtype."""
    loop, size = config.loop, jnp.dtype(config.dtype).itemsize
    position = 2 * config.kv_heads * config.head_width * size
    own, gated = loop.later_attention == "own", loop.later_attention == "gated"
    looped = len(config.looped_layers)
    caches = looped * (loop.count if own else 1) + config.layers - looped
    window = min(loop.window, config.max_length)
    return CacheBytes(
        per_token=position * caches,
        windows=position * looped * (loop.count - 1) * window if gated else 0,
    )
