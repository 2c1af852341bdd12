"""Small pieces shared by training and decoding: parameters, RMSNorm, RoPE, SwiGLU, embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig, RopeScalingConfig
from plt_jax.distributed.axes import sharded_axes
from plt_jax.model.kernels import traced_platform


class Parameter(NamedTuple):
    """The declaration of a parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initializer: nn.initializers.Initializer
    decays: bool = False
    """Whether weight decay applies."""


def declare(module: nn.Module, parameters: Mapping[str, Parameter]) -> dict[str, jax.Array]:
    """Creates (or reads) a module's parameters, float32, with their logical axis names attached."""
    return {  # pyright: ignore[reportReturnType] - `param` unboxes
        name: module.param(
            name,
            nn.with_logical_partitioning(parameter.initializer, parameter.axes),
            parameter.shape,
            jnp.float32,
        )
        for name, parameter in parameters.items()
    }


def scale_parameter(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Parameter:
    """The scale of an RMSNorm."""
    return Parameter(shape, axes, nn.initializers.ones_init())


def constant_parameter(
    shape: tuple[int, ...], axes: tuple[str | None, ...], value: float
) -> Parameter:
    """A parameter that starts at a value."""
    return Parameter(shape, axes, nn.initializers.constant(value))


def zero_parameter(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Parameter:
    """A parameter that starts at zero."""
    return Parameter(shape, axes, nn.initializers.zeros_init())


def projection(
    shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int, scale: float = 1.0
) -> Parameter:
    """A projection that starts normal with standard deviation `scale / sqrt(inputs)`."""
    return Parameter(shape, axes, nn.initializers.normal(scale / math.sqrt(inputs)), decays=True)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides the last axis by its root mean square, in float32; keeps x's shape and dtype.

    Args:
      x: [..., D].
      scale: [D]; it may have more axes where no gradient is taken.
    """
    return _rms_norm(epsilon, x, scale)


# JAX's own backward pass would keep three float32 arrays of x's shape.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(epsilon: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    return _rms_norm_forward(epsilon, x, scale)[0]


def _rms_norm_forward(epsilon: float, x: jax.Array, scale: jax.Array):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype), (x, inverse, scale)


def _rms_norm_backward(epsilon: float, kept: tuple[jax.Array, ...], cotangent: jax.Array):
    x, inverse, scale = kept
    normed, wide = x.astype(jnp.float32) * inverse, cotangent.astype(jnp.float32)
    scaled = wide * scale
    along = jnp.mean(scaled * normed, axis=-1, keepdims=True)
    to_x = (inverse * (scaled - along * normed)).astype(x.dtype)
    to_scale = jnp.sum(wide * normed, axis=tuple(range(x.ndim - 1)))
    return to_x, to_scale.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class Rotation(NamedTuple):
    """Cosines and sines of RoPE's angles, float32 [B, 1, T, H/2]."""

    cos: jax.Array
    sin: jax.Array


def rope_rotation(config: ModelConfig, positions_BT: jax.Array) -> Rotation:
    """RoPE's rotation at integer positions [B, T]."""
    exponents = jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width
    frequencies = scale_frequencies(config.rope_scaling, 1.0 / config.rope_theta**exponents)
    angles = positions_BT[:, None, :, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def scale_frequencies(scaling: RopeScalingConfig, frequencies: jax.Array) -> jax.Array:
    """RoPE's frequencies, in radians per position, stretched to a longer context."""
    if scaling.kind == "none":
        return frequencies
    low = frequencies / scaling.factor
    if scaling.kind == "linear":
        return low
    # A frequency stays if the original context held many of its periods.
    periods = scaling.original_length * frequencies / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = jnp.clip((periods - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * low


def rotate(x_BNTH: jax.Array, rotation: Rotation) -> jax.Array:
    """Applies RoPE in the half-rotation layout of llama: pairs are (h, h + H/2)."""
    wide = x_BNTH.astype(jnp.float32)
    if traced_platform() == "gpu":
        # One kernel instead of three, but a tenth of a small model's training time on a CPU.
        x_BNT2h = wide.reshape(*wide.shape[:-1], 2, -1)
        cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]
        signs_21 = jnp.array([[-1.0], [1.0]])
        turned = x_BNT2h * cos + jnp.flip(x_BNT2h, axis=-2) * (signs_21 * sin)
        return turned.reshape(x_BNTH.shape).astype(x_BNTH.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = (
        first * rotation.cos - second * rotation.sin,
        second * rotation.cos + first * rotation.sin,
    )
    return jnp.concatenate(turned, axis=-1).astype(x_BNTH.dtype)


def multiplies_rows() -> bool:
    """Whether products with weights are those of rows: [B, T] as one axis.

    For the gradient of a weight, which sums over B and T, XLA's CPU compiler would transpose copies
    of both operands. Other compilers do not, and B and T are no one axis where devices share T.
    """
    return traced_platform() == "cpu" and not sharded_axes("length")


def times_weight(x_BTD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """The product with a weight in the dtype of x, [B, T, D] x [D, F] -> [B, T, F]."""
    weight_DF = weight_DF.astype(x_BTD.dtype)
    if not multiplies_rows():
        return jnp.einsum("BTD,DF->BTF", x_BTD, weight_DF)
    B, T, D = x_BTD.shape
    return (x_BTD.reshape(B * T, D) @ weight_DF).reshape(B, T, -1)


def swiglu(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """The SwiGLU feed-forward layer: (silu(x·gate) * (x·up))·down, [B, T, D] -> [B, T, D]."""
    return times_weight(
        silu_times(times_weight(x_BTD, gate_DF), times_weight(x_BTD, up_DF)), down_FD
    )


# JAX's own backward pass would keep sigmoid(gate) and silu(gate), too.
@jax.custom_vjp
def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate)·up, elementwise."""
    return jax.nn.silu(gate) * up


def _silu_times_backward(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    gate, up = kept
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


silu_times.defvjp(lambda gate, up: (silu_times(gate, up), (gate, up)), _silu_times_backward)


def embed(tokens_BT: jax.Array, embedding_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the embedding table, [B, T] -> [B, T, D] in the compute dtype."""
    # Rows are converted, not the table: so the gradient of a row is summed over all positions of
    # its token in float32. In bfloat16 it was wrong by 14 % for tokens at 1000 positions or more.
    return embedding_VD[tokens_BT].astype(dtype)


def head_weight(embedding_VD: jax.Array, head_DV: jax.Array | None) -> jax.Array:
    """The weight of the head, [D, V]: without one of its own, the transposed embedding."""
    return embedding_VD.T if head_DV is None else head_DV


def logits_from(x_BTD: jax.Array, embedding_VD: jax.Array, head_DV: jax.Array | None) -> jax.Array:
    """Normed states to float32 logits [B, T, V]; without a head, by the transposed embedding."""
    weight_DV = head_weight(embedding_VD, head_DV).astype(x_BTD.dtype)
    return jnp.einsum("BTD,DV->BTV", x_BTD, weight_DV, preferred_element_type=jnp.float32)
