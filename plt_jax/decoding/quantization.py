"""Numbers in eight bits: cached keys and values, and weights.

Rounding is symmetric around zero: a number is a whole number of steps, from -127 to 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


class Quantized(flax.struct.PyTreeNode):
    """Numbers in eight bits, some of which share a scale."""

    values: jax.Array
    """int8: the numbers divided by their scale, rounded."""
    scales: jax.Array
    """float32: the largest magnitude of the numbers that share it, over 127. Its shape is that of
    `values`, with 1 for the axes along which they share it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantized(self, dtype: jnp.dtype) -> jax.Array:
        """The numbers, rounded to `dtype`."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


def quantize(x: jax.Array, axes: int | tuple[int, ...] = -1) -> Quantized:
    """Rounds to eight bits; numbers share a scale along `axes`.

    Numbers that are whole steps already, with one of 127 steps among them, stay as they are.
    """
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / 127
    values = jnp.round(wide / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny))
    return Quantized(values.astype(jnp.int8), scales)


SUMMED = {
    **dict.fromkeys("qkv", -3),
    "o": (-3, -2),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), -2),
    **dict.fromkeys(("shared_gate_proj", "shared_up", "shared_down"), -2),
    **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), -2),
    "head": -2,
}
"""The axes of the declared weights that their products sum over, counted from the end. Only
these weights are rounded; norms, biases, gates and routers are small, and stay as they are."""


def quantize_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters whose large weights are Quantized, with one scale for each output of a product.

    The embedding is rounded where it is also the head, with one scale for each token.

    Args:
      params: as `Transformer.init` returns them, unboxed. Weights that are Quantized stay so.
    """
    summed = SUMMED if "head" in params else SUMMED | {"embedding": -1}

    def rounded(weights: Mapping[str, Any]) -> dict[str, Any]:
        return {name: one(name, weight) for name, weight in weights.items()}

    def one(name: str, weight: Any) -> Any:
        if isinstance(weight, Mapping):
            return rounded(weight)
        if name not in summed or is_quantized(weight):
            return weight
        return _quantize_weight(weight, summed[name])

    return rounded(params)


_quantize_weight = jax.jit(quantize, static_argnums=1)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def dequantize_params(params: Any, dtype: jnp.dtype | str = "float32") -> Any:
    """Parameters with arrays of `dtype` in the place of those that are Quantized.

    Rounding them again gives the same numbers in eight bits, if they are float32.
    """

    def wide(leaf: Any) -> Any:
        return leaf.dequantized(jnp.dtype(dtype)) if is_quantized(leaf) else leaf

    return jax.tree.map(wide, params, is_leaf=is_quantized)
