"""Weights laid out for decoding.

A decode step reads every weight once and multiplies it with a few rows, so its time is the time of
reading the weights. Therefore each layer has arrays of its own, since slices of stacked ones would
be copies; the weights that multiply one input are fused; and every weight has its outputs first,
[N, D]. In eight bits there are half as many bytes to read as in bfloat16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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


FUSED = {
    "expert_gate_up": ("expert_gate", "expert_up"),
    "expert_down": ("expert_down",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
    "shared_gate_up": ("shared_gate_proj", "shared_up"),
    "shared_down": ("shared_down",),
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "qk_norm": ("q_norm", "k_norm"),
}
"""The declared weights that become one weight of a layer, or that are laid out in another way; the
largest first. `_fuse` says how."""


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
    top = _prepare_top(config, declared, dtype)
    stacks = [
        _prepare_stack(config, declared[name], stack.layers, dtype)
        for name, stack in stacks_of(config).items()
    ]
    return top.replace(layers=tuple(itertools.chain(*stacks)))


def _prepare_top(config: ModelConfig, params: Params, dtype: str | None) -> DecodeWeights:
    """The weights that no layer has."""
    names = [name for name in params if name not in stacks_of(config)]
    program = _lay_out_top_at_once if mesh_is_active() else _lay_out_top
    return program(config, _take(params, names), dtype)


def _lay_out_top(config: ModelConfig, params: Params, dtype: str | None) -> DecodeWeights:
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


def _prepare_stack(
    config: ModelConfig, stacked: Weights, layers: int, dtype: str | None
) -> list[dict[str, Any]]:
    """The weights of each layer of a stack; see `DecodeWeights`.

    Weights that are fused are asked for together, and let go before the next ones, the largest
    first. So where they are read on demand, the weights of one product of all layers are in memory
    twice, and no others.
    """
    fused = [names for names in FUSED.values() if names[0] in stacked]
    others = [name for name in stacked if name not in itertools.chain(*fused)]
    laid_out: list[dict[str, Any]] = [{} for _ in range(layers)]
    program = _lay_out_layer_at_once if mesh_is_active() else _lay_out_layer
    for names in (*fused, others):
        declared = _take(stacked, names)
        for index, layer in enumerate(laid_out):
            # On a mesh weights travel between devices in copies, which shall be those of one layer.
            # Everywhere a layer has to be made before what it is made of is let go.
            layer |= jax.block_until_ready(program(config, declared, index, dtype))
        del declared  # before the next ones are read
    return laid_out


def _take(params: Params, names: Sequence[str]) -> dict[str, Any]:
    """Some parameters. A tree that reads them on demand reads these together."""
    together = getattr(params, "together", None)
    return {name: params[name] for name in names} if together is None else together(names)


def _lay_out_layer(
    config: ModelConfig, stacked: Weights, index: int | jax.Array, dtype: str | None
) -> dict[str, Weight]:
    """Lays out some of a layer's weights."""

    def of_layer(weights: jax.Array) -> jax.Array:
        if isinstance(index, int):
            return weights[index]
        return jax.lax.dynamic_index_in_dim(weights, index, keepdims=False)

    declared = jax.tree.map(of_layer, dict(stacked))
    if dtype == "int8":
        declared = quantize_params(declared)
    return {name: _shard_weight(name, weight) for name, weight in _fuse(config, declared).items()}


def _fuse(config: ModelConfig, declared: Weights) -> dict[str, Weight]:
    """Lays out some of a layer's weights; of those that are fused, all or none are there.

    Norms over all heads stay as they are declared.
    """
    left, dtype = dict(declared), jnp.dtype(config.dtype)
    K, H = config.kv_heads, config.head_width

    # Scales take the same steps as their weights, with a width of 1.
    def join_qkv(q_DNH: jax.Array, k_DKH: jax.Array, v_DKH: jax.Array) -> jax.Array:
        grouped = [q_DNH.reshape(-1, K, config.heads // K, H), k_DKH[:, :, None], v_DKH[:, :, None]]
        return jnp.concatenate(grouped, axis=2).reshape(len(q_DNH), -1).T

    def outputs_first(weight: jax.Array) -> jax.Array:
        return weight.swapaxes(-1, -2)

    def join_outputs_first(*weights: jax.Array) -> jax.Array:
        return jnp.stack([outputs_first(weight) for weight in weights], axis=-3)

    def join_heads(q_NH: jax.Array, k_KH: jax.Array, v_KH: jax.Array) -> jax.Array:
        return jnp.concatenate([q_NH.reshape(K, -1, H), k_KH[:, None], v_KH[:, None]], axis=1)

    def repeat_norm(q_norm_H: jax.Array, k_norm_H: jax.Array) -> jax.Array:
        return jnp.stack([q_norm_H] * (config.heads // K) + [k_norm_H])[:, None]

    products: dict[str, Callable[..., jax.Array]] = {
        "qkv": join_qkv,
        "o": lambda o_NHD: o_NHD.reshape(-1, o_NHD.shape[-1]).T,
        **dict.fromkeys(("gate_up", "shared_gate_up", "expert_gate_up"), join_outputs_first),
        **dict.fromkeys(("down", "shared_down", "expert_down"), outputs_first),
    }
    small: dict[str, Callable[..., jax.Array]] = {"qkv_bias": join_heads}
    if config.qk_norm_over == "head":
        small["qk_norm"] = repeat_norm
    fused = {}
    for name, lay_out in (products | small).items():
        if FUSED[name][0] in left:
            weights = [left.pop(declared_name) for declared_name in FUSED[name]]
            if name in products:
                weights = [in_dtype(weight, dtype) for weight in weights]
            fused[name] = jax.tree.map(lay_out, *weights)
    return left | fused


_lay_out_top_at_once = jax.jit(_lay_out_top, static_argnums=(0, 2))
_lay_out_layer_at_once = jax.jit(_lay_out_layer, static_argnums=(0, 3))

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
