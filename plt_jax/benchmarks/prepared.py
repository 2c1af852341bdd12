"""Variants of one model that share its random weights, as decoding reads them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.config.variants import NO_LOOP, Variant
from plt_jax.decoding.options import WEIGHTS
from plt_jax.decoding.quantization import is_quantized
from plt_jax.decoding.weights import DecodeWeights, prepare_for_decode
from plt_jax.model.attention import gate_parameters
from plt_jax.model.transformer import Transformer


def random_weights(config: ModelConfig, dtype: str | None = None) -> DecodeWeights:
    """A model's parameters as initialised, prepared for decoding in a dtype; see
    `prepare_for_decode`."""
    init = jax.jit(Transformer(config).init)
    declared = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.block_until_ready(prepare_for_decode(config, declared, dtype))


def variant_weights(config: ModelConfig, weights: DecodeWeights) -> DecodeWeights:
    """A variant's weights: the arrays of `weights`, which all variants share, and its gates.

    Layers that do not loop have gates, too, which nothing reads.

    A deeper variant has copies of the last layer.
    """
    layers = weights.layers
    copies = (jax.tree.map(jnp.copy, layers[-1]) for _ in range(config.layers - len(layers)))
    weights = dataclasses.replace(weights, layers=(*layers, *copies))
    if config.has_coda and config.loop.normalize_between_loops:
        weights = dataclasses.replace(weights, loop_norm=weights.final_norm)
    if config.loop.later_attention != "gated":
        return weights
    gates = {
        name: gate.initializer(jax.random.key(0), gate.shape, jnp.float32)
        for name, gate in gate_parameters(config).items()
    }
    return dataclasses.replace(weights, layers=tuple(layer | gates for layer in weights.layers))


class PreparedVariant(NamedTuple):
    """A variant with its model's configuration and the weights that decoding reads."""

    variant: Variant
    config: ModelConfig
    weights: DecodeWeights

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.variant.label + self._dtype

    @property
    def scheme(self) -> str:
        """Its scheme, which is another one to plots if the weights have another dtype, or if other
        layers loop."""
        looped = self.variant.looped
        layers = "" if looped is None else ", layers {} to {}".format(*looped)
        return self.variant.scheme + layers + self._dtype

    @property
    def _dtype(self) -> str:
        return ", int8" if is_quantized(self.weights.layers[0]["qkv"]) else ""


def prepare(variant: Variant, base: ModelConfig, weights: DecodeWeights) -> PreparedVariant:
    """A variant of the model `base`, whose variant without loops has `weights`."""
    config = variant.apply(base)
    return PreparedVariant(variant, config, variant_weights(config, weights))


def prepare_all(
    variants: Sequence[Variant], base: ModelConfig, dtypes: Sequence[str | None] = (None,)
) -> list[PreparedVariant]:
    """Every variant of the model `base` with weights of every dtype, which the variants share.

    Args:
      dtypes: see `prepare_for_decode`.
    """
    by_dtype = [random_weights(NO_LOOP.apply(base), dtype) for dtype in dtypes]
    return [prepare(variant, base, weights) for weights in by_dtype for variant in variants]


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the option --weights: a list of dtypes for `prepare_all`."""
    parser.add_argument(
        "--weights",
        type=_dtypes,
        default=[None],
        help="dtypes of the large weights, such as compute,int8; default compute, the compute "
        "dtype",
    )


def _dtypes(text: str) -> list[str | None]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ("compute", *WEIGHTS)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not compute or {', '.join(WEIGHTS)}")
    return [None if name == "compute" else name for name in names]
