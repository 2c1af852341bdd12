"""Variants of one model that share its random weights, as decoding reads them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.config.variants import Variant
from plt_jax.decoding.weights import DecodeWeights, prepare_for_decode
from plt_jax.model.attention import gate_parameters
from plt_jax.model.transformer import Transformer


def random_weights(config: ModelConfig) -> DecodeWeights:
    """A model's parameters as initialised, prepared for decoding."""
    init = jax.jit(Transformer(config).init)
    declared = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.block_until_ready(prepare_for_decode(config, declared))


def variant_weights(config: ModelConfig, weights: DecodeWeights) -> DecodeWeights:
    """A variant's weights: the arrays of `weights`, which all variants share, and its gates.

    A deeper variant has copies of the last layer.
    """
    layers = weights.layers
    copies = (jax.tree.map(jnp.copy, layers[-1]) for _ in range(config.layers - len(layers)))
    weights = dataclasses.replace(weights, layers=(*layers, *copies))
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
        return self.variant.label


def prepare(variant: Variant, base: ModelConfig, weights: DecodeWeights) -> PreparedVariant:
    """A variant of the model `base`, whose variant without loops has `weights`."""
    config = variant.apply(base)
    return PreparedVariant(variant, config, variant_weights(config, weights))
