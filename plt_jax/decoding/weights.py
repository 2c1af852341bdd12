"""Weights laid out for decoding.

A decode step reads every weight once and multiplies it with a few rows, so its time is the time of
reading the weights. Therefore each layer has arrays of its own, since slices of stacked ones would
be copies; the weights that multiply one input are fused; and every weight has its outputs first,
[N, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.distributed.axes import (
    batch_axes,
    current_axes,
    dividing_axes,
    mesh_is_active,
    shard,
    unboxed,
)
from plt_jax.model.block import stacks_of

Params = Mapping[str, Any]
Weights = Mapping[str, jax.Array]


class DecodeWeights(flax.struct.PyTreeNode):
    """A model's weights as `prepare_for_decode` lays them out."""

    embedding: jax.Array
    """[V, D] in the compute dtype."""
    final_norm: jax.Array
    """float32 [D]."""
    head: jax.Array | None
    """[V, D] in the compute dtype; None where the embedding is the head."""
    layers: tuple[dict[str, jax.Array], ...]
    """One dict for each layer. The declared norms, output bias, gate and router are as they were;
    "qk_norm" [G+1, 1, H] are the norms of G query heads and a key head, and "qkv_bias" [K, G+2, H]
    all biases. In the compute dtype are "qkv" [K·(G+2)·H, D] (each key/value head behind the G
    query heads that read it), "o" [D, N·H], and "gate_up" [2, F, D] and "down" [D, F]; of a mixture
    of experts instead "expert_gate_up" [X, 2, F, D] and "expert_down" [X, D, F], and of its shared
    expert "shared_gate_up" and "shared_down"."""


def prepare_for_decode(config: ModelConfig, params: Params | DecodeWeights) -> DecodeWeights:
    """Lays parameters out for decoding; call it once, outside of jit.

    Under a mesh the weights lie as DECODE_AXES says.

    Args:
      params: as `Transformer.init` returns them, boxed or not. DecodeWeights are returned as they
        are.
    """
    if isinstance(params, DecodeWeights):
        return params
    declared: Params = unboxed(params)
    return _prepare_on_mesh(config, declared) if mesh_is_active() else _prepare(config, declared)


def _prepare(config: ModelConfig, params: Params) -> DecodeWeights:
    dtype = jnp.dtype(config.dtype)
    head = params["head"].astype(dtype).T if "head" in params else None
    return DecodeWeights(
        embedding=_shard_weight("embedding", params["embedding"].astype(dtype)),
        final_norm=_shard_weight("final_norm", params["final_norm"]),
        head=None if head is None else _shard_weight("head", head),
        layers=tuple(
            _prepare_layer(config, {name: stacked[j] for name, stacked in params[part].items()})
            for part, stack in stacks_of(config).items()
            for j in range(stack.layers)
        ),
    )


_prepare_on_mesh = jax.jit(_prepare, static_argnums=0)


def _prepare_layer(config: ModelConfig, declared: Weights) -> dict[str, jax.Array]:
    """Lays out the weights of one layer; see `DecodeWeights`."""
    dtype, left = jnp.dtype(config.dtype), dict(declared)
    D, K, H = config.width, config.kv_heads, config.head_width
    q_DNH, k_DKH, v_DKH = (left.pop(name).astype(dtype) for name in "qkv")
    grouped = [q_DNH.reshape(D, K, -1, H), k_DKH[:, :, None], v_DKH[:, :, None]]
    fused = {
        "qkv": jnp.concatenate(grouped, axis=2).reshape(D, -1).T,
        "o": left.pop("o").astype(dtype).reshape(-1, D).T,
    }
    if config.qkv_bias:
        q_NH, k_KH, v_KH = (left.pop(f"{name}_bias") for name in "qkv")
        grouped = [q_NH.reshape(K, -1, H), k_KH[:, None], v_KH[:, None]]
        fused["qkv_bias"] = jnp.concatenate(grouped, axis=1)
    if config.qk_norm:
        norms = [left.pop("q_norm")] * (config.heads // K) + [left.pop("k_norm")]
        fused["qk_norm"] = jnp.stack(norms)[:, None]
    for gate, up, down, fused_in, fused_out in (
        ("ffn_gate", "ffn_up", "ffn_down", "gate_up", "down"),
        ("shared_gate_proj", "shared_up", "shared_down", "shared_gate_up", "shared_down"),
    ):
        if gate in left:
            both = [left.pop(name).astype(dtype).T for name in (gate, up)]
            down_FD = left.pop(down)
            fused |= {fused_in: jnp.stack(both), fused_out: down_FD.astype(dtype).T}
    if "expert_gate" in left:
        both = [
            left.pop(name).astype(dtype).swapaxes(1, 2) for name in ("expert_gate", "expert_up")
        ]
        fused["expert_gate_up"] = jnp.stack(both, axis=1)
        fused["expert_down"] = left.pop("expert_down").astype(dtype).swapaxes(1, 2)
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


def _shard_weight(name: str, weight: jax.Array) -> jax.Array:
    """Shards a weight over the current mesh.

    A dimension that does not divide by all mesh axes of its logical axis is split over those that
    it divides by.
    """
    if not mesh_is_active():
        return weight
    dimensions = zip(DECODE_AXES.get(name, ()), weight.shape, strict=False)
    return shard(
        weight, *(axis and dividing_axes(current_axes(axis), size) for axis, size in dimensions)
    )


def shard_rows(x_BTD: jax.Array) -> jax.Array:
    """Shards states for products with decode weights: by sequence, over the mesh axes that split no
    weight."""
    if not mesh_is_active():
        return x_BTD
    return shard(x_BTD, batch_axes(x_BTD.shape[0], "decode_batch"))
