"""Weights laid out for decoding.

A decode step reads every weight once and multiplies it with a few rows, so its time is the time of
reading the weights. Therefore each layer has arrays of its own, since slices of stacked ones would
be copies; the weights that multiply one input are fused; and every weight has its outputs first,
[N, D]. In eight bits there are half as many bytes to read as in bfloat16.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.decoding.options import WEIGHTS
from plt_jax.decoding.quantization import Quantized, is_quantized, quantize_params
from plt_jax.distributed.axes import (
    batch_axes,
    current_axes,
    dividing_axes,
    mesh_is_active,
    shard,
    unboxed,
)
from plt_jax.errors import InputError
from plt_jax.model.block import stacks_of

Params = Mapping[str, Any]
Weight = jax.Array | Quantized
Weights = Mapping[str, Any]
"""The weights of a layer: arrays, of which decoding may have large ones as Quantized."""


class DecodeWeights(flax.struct.PyTreeNode):
    """A model's weights as `prepare_for_decode` lays them out."""

    embedding: Weight
    """[V, D]."""
    final_norm: jax.Array
    """float32 [D]."""
    loop_norm: jax.Array | None
    """float32 [D], the norm between loops where layers follow the loops; None where it is the
    final norm, or where there is none."""
    hidden_scale: jax.Array | None
    """float32 [D], the learned scale of the previous loop's output, if it is learned."""
    exit_gate: jax.Array | None
    """float32 [D, 1], the exit gate's weights; None without a gate."""
    exit_gate_bias: jax.Array | None
    """float32 [1]."""
    head: Weight | None
    """[V, D]; None where the embedding is the head."""
    layers: tuple[dict[str, Any], ...]
    """One dict for each layer. The declared norms, output bias, gate and router are as they were,
    but "qk_norm" [G+1, 1, H] are the norms of G query heads and a key head, where each head has its
    own, and "qkv_bias" [K, G+2, H] all biases. The others are in the compute dtype, or Quantized
    with a scale for each output:
    "qkv" [K·(G+2)·H, D] (each key/value head behind the G query heads that read it), "o" [D, N·H],
    and "gate_up" [2, F, D] and "down" [D, F]; of a mixture of experts instead "expert_gate_up"
    [X, 2, F, D] and "expert_down" [X, D, F], and of its shared expert "shared_gate_up" and
    "shared_down"."""


def prepare_for_decode(
    config: ModelConfig, params: Params | DecodeWeights, dtype: str | None = None
) -> DecodeWeights:
    """Lays parameters out for decoding; call it once, outside of jit.

    Under a mesh the weights lie as DECODE_AXES says.

    Args:
      params: as `Transformer.init` returns them, boxed or not, or as `quantize_params` does.
        DecodeWeights are returned as they are.
      dtype: "int8" rounds the large weights to eight bits, with one scale for each output of a
        product; see `quantize_params`. Default: the compute dtype.

    Raises:
      InputError: another dtype; or "int8" for DecodeWeights in the compute dtype.
    """
    if dtype is not None and dtype not in WEIGHTS:
        raise InputError(f"weights are asked for in {dtype}; it must be {' or '.join(WEIGHTS)}")
    if isinstance(params, DecodeWeights):
        if dtype is not None and not is_quantized(params.layers[0]["qkv"]):
            raise InputError(
                f"the weights are laid out in {config.dtype} already; give the parameters to have "
                f"them in {dtype}"
            )
        return params
    declared: Params = unboxed(params)
    lay_out = _prepare_on_mesh if mesh_is_active() else _prepare
    return lay_out(config, declared, dtype)


def _prepare(config: ModelConfig, params: Params, dtype: str | None) -> DecodeWeights:
    if dtype == "int8":
        params = quantize_params(params)
    layers = tuple(
        _prepare_layer(config, jax.tree.map(operator.itemgetter(j), params[part]))
        for part, stack in stacks_of(config).items()
        for j in range(stack.layers)
    )
    return _prepare_top(config, _top_of(config, params), dtype).replace(layers=layers)


def _prepare_on_mesh(config: ModelConfig, params: Params, dtype: str | None) -> DecodeWeights:
    """As `_prepare`, one layer after the other, since weights travel between devices in copies."""
    layers = tuple(
        jax.block_until_ready(_prepare_layer_of(config, params[part], j, dtype))
        for part, stack in stacks_of(config).items()
        for j in range(stack.layers)
    )
    top = jax.jit(_prepare_top, static_argnums=(0, 2))(config, _top_of(config, params), dtype)
    return top.replace(layers=layers)


def _top_of(config: ModelConfig, params: Params) -> Params:
    """The parameters that no layer has."""
    return {name: params[name] for name in params if name not in stacks_of(config)}


def _prepare_top(config: ModelConfig, params: Params, dtype: str | None) -> DecodeWeights:
    """The weights that no layer has."""
    if dtype == "int8":
        params = quantize_params(params)
    embedding, head = (in_dtype(params.get(name), config.dtype) for name in ("embedding", "head"))
    head = jax.tree.map(jnp.transpose, head)
    return DecodeWeights(
        embedding=_shard_weight("embedding", embedding),
        final_norm=_shard_weight("final_norm", params["final_norm"]),
        loop_norm=_shard_weight("loop_norm", params.get("loop_norm")),
        hidden_scale=_shard_weight("hidden_scale", params.get("hidden_scale")),
        exit_gate=_shard_weight("exit_gate", params.get("exit_gate")),
        exit_gate_bias=_shard_weight("exit_gate_bias", params.get("exit_gate_bias")),
        head=_shard_weight("head", head),
        layers=(),
    )


@partial(jax.jit, static_argnums=(0, 3))
def _prepare_layer_of(
    config: ModelConfig, stacked: Weights, layer: int, dtype: str | None
) -> dict[str, Weight]:
    """As `_prepare_layer`, of a layer of stacked ones."""

    def of_layer(weights: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False)

    declared = jax.tree.map(of_layer, stacked)
    if dtype == "int8":
        declared = quantize_params(declared)
    return _prepare_layer(config, declared)


def _prepare_layer(config: ModelConfig, declared: Weights) -> dict[str, Weight]:
    """Lays out the weights of one layer; see `DecodeWeights`."""
    left, dtype = dict(declared), jnp.dtype(config.dtype)
    K, H = config.kv_heads, config.head_width

    def laid_out(lay_out: Callable[..., jax.Array], *names: str) -> Weight:
        return jax.tree.map(lay_out, *(in_dtype(left.pop(name), dtype) for name in names))

    # Scales take the same steps as their weights, with a width of 1.
    def join_qkv(q_DNH: jax.Array, k_DKH: jax.Array, v_DKH: jax.Array) -> jax.Array:
        grouped = [q_DNH.reshape(-1, K, config.heads // K, H), k_DKH[:, :, None], v_DKH[:, :, None]]
        return jnp.concatenate(grouped, axis=2).reshape(len(q_DNH), -1).T

    def outputs_first(weight: jax.Array) -> jax.Array:
        return weight.swapaxes(-1, -2)

    def join_outputs_first(*weights: jax.Array) -> jax.Array:
        return jnp.stack([outputs_first(weight) for weight in weights], axis=-3)

    fused: dict[str, Weight] = {
        "qkv": laid_out(join_qkv, *"qkv"),
        "o": laid_out(lambda o_NHD: o_NHD.reshape(-1, o_NHD.shape[-1]).T, "o"),
    }
    if config.qkv_bias:
        q_NH, k_KH, v_KH = (left.pop(f"{name}_bias") for name in "qkv")
        grouped = [q_NH.reshape(K, -1, H), k_KH[:, None], v_KH[:, None]]
        fused["qkv_bias"] = jnp.concatenate(grouped, axis=1)
    if config.qk_norm and config.qk_norm_over == "head":
        norms = [left.pop("q_norm")] * (config.heads // K) + [left.pop("k_norm")]
        fused["qk_norm"] = jnp.stack(norms)[:, None]
    for gate, up, down, fused_in, fused_out in (
        ("ffn_gate", "ffn_up", "ffn_down", "gate_up", "down"),
        ("shared_gate_proj", "shared_up", "shared_down", "shared_gate_up", "shared_down"),
        ("expert_gate", "expert_up", "expert_down", "expert_gate_up", "expert_down"),
    ):
        if gate in left:
            fused[fused_in] = laid_out(join_outputs_first, gate, up)
            fused[fused_out] = laid_out(outputs_first, down)
    return {name: _shard_weight(name, weight) for name, weight in (left | fused).items()}


DECODE_AXES = {
    "embedding": ("decode_width", None),
    "head": ("decode_width", None),
    "qkv": ("decode_width", None),
    "o": (None, "decode_width"),
    "gate_up": (None, "decode_width", None),
    "down": (None, "decode_width"),
    "shared_gate_up": (None, "decode_width", None),
    "shared_down": (None, "decode_width"),
    "expert_gate_up": ("expert", None, "decode_width", None),
    "expert_down": ("expert", None, "decode_width"),
}
"""The logical axes of the weights that a mesh splits. Every device has the others whole."""

EXPERT_AXES = {name: DECODE_AXES[name] for name in ("expert_gate_up", "expert_down")}


def in_dtype(weight: Any, dtype: jnp.dtype | str) -> Any:
    """A weight in the compute dtype, unless it is Quantized."""
    if weight is None or is_quantized(weight):
        return weight
    return weight.astype(jnp.dtype(dtype))


def _shard_weight(name: str, weight: Weight | None) -> Any:
    """Shards a weight over the current mesh.

    A dimension that does not divide by all mesh axes of its logical axis is split over those that
    it divides by; so scales are whole along the axes that they are shared by.
    """
    if not mesh_is_active():
        return weight

    def shard_array(array: jax.Array) -> jax.Array:
        dimensions = zip(DECODE_AXES.get(name, ()), array.shape, strict=False)
        over = [axis and dividing_axes(current_axes(axis), size) for axis, size in dimensions]
        return shard(array, *over)

    return jax.tree.map(shard_array, weight)


def shard_rows(x_BTD: jax.Array) -> jax.Array:
    """Shards states for products with decode weights: by sequence, over the mesh axes that split no
    weight."""
    if not mesh_is_active():
        return x_BTD
    return shard(x_BTD, batch_axes(x_BTD.shape[0], "decode_batch"))
