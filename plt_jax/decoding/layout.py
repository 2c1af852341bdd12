"""Weights laid out for decoding, and the products with them.

A decode step reads every weight once and multiplies it with a few rows, so what it costs is how
fast weights come out of memory. Layers are separate arrays, since slices of stacked ones would be
copies; products of one input are fused; and every weight lies outputs first, [N, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.model.block import Products
from plt_jax.model.moe import (
    EXPERTS,
    RouterStatistics,
    apply_experts,
    gather_experts,
    mixture_of_experts,
)

Params = dict[str, Any]
Weights = Mapping[str, jax.Array]

# Beyond these rows a CPU is bound by arithmetic, and the fused sum no better than a product.
# Processes that ran such sums on jax 0.10 crashed now and then, in XLA's threads.
MOST_SUMMED_ROWS = 256 if jax.__version_info__ >= (0, 12) else 0


def prepare_for_decode(config: ModelConfig, params: Params) -> Params:
    """Parameters laid out for decoding; do this once, outside jit.

    Args:
      params: as `Transformer.init` gives them, boxed or not; prepared ones are returned as they
        are.

    Returns:
      "embedding" [V, D], "head" [V, D] unless tied, "final_norm" [D], and "layers", a tuple of one
      dict per layer: the declared norms, biases, gate and router in float32, and in the compute
      dtype "qkv" [K·(G+2)·H, D] (each key/value head behind the G query heads that read it), "o"
      [D, N·H], and "gate_up" [2·F, D] and "down" [D, F], or the experts as they are declared and
      the shared expert's "shared_gate_up" and "shared_down".
    """
    if isinstance(params["layers"], tuple):
        return params
    params = nn.unbox(params)
    dtype = jnp.dtype(config.dtype)
    prepared = {
        "embedding": params["embedding"].astype(dtype),
        "final_norm": params["final_norm"],
        "layers": tuple(
            _prepare_layer(config, {name: stacked[j] for name, stacked in params["layers"].items()})
            for j in range(config.layers)
        ),
    }
    if "head" in params:
        prepared["head"] = params["head"].astype(dtype).T
    return prepared


def _prepare_layer(config: ModelConfig, declared: Params) -> Params:
    """One layer's weights; see `prepare_for_decode`."""
    dtype, left = jnp.dtype(config.dtype), dict(declared)
    D, K, H = config.width, config.kv_heads, config.head_width
    q_DNH, k_DKH, v_DKH = (left.pop(name).astype(dtype) for name in "qkv")
    grouped = [q_DNH.reshape(D, K, -1, H), k_DKH[:, :, None], v_DKH[:, :, None]]
    fused = {
        "qkv": jnp.concatenate(grouped, axis=2).reshape(D, -1).T,
        "o": left.pop("o").astype(dtype).reshape(-1, D).T,
    }
    for gate, up, down, fused_in, fused_out in (
        ("ffn_gate", "ffn_up", "ffn_down", "gate_up", "down"),
        ("shared_gate_proj", "shared_up", "shared_down", "shared_gate_up", "shared_down"),
    ):
        if gate in left:
            both = [left.pop(name).astype(dtype).T for name in (gate, up)]
            down_FD = left.pop(down)
            fused |= {fused_in: jnp.concatenate(both), fused_out: down_FD.astype(dtype).T}
    experts = {name: left.pop(name).astype(dtype) for name in EXPERTS if name in left}
    return left | fused | experts


def linear(x: jax.Array, weight_ND: jax.Array) -> jax.Array:
    """x [..., D] times a prepared weight, summed and returned in float32 [..., N]."""
    rows_MD = x.reshape(-1, x.shape[-1])
    out_MN = jax.lax.platform_dependent(rows_MD, weight_ND, cpu=_linear_on_cpu, default=_product)
    return out_MN.reshape(*x.shape[:-1], -1)


def _product(x_MD: jax.Array, weight_ND: jax.Array) -> jax.Array:
    return jnp.einsum("MD,ND->MN", x_MD, weight_ND, preferred_element_type=jnp.float32)


def _linear_on_cpu(x_MD: jax.Array, weight_ND: jax.Array) -> jax.Array:
    """The fastest form that XLA has for few rows on a CPU (benchmarks/results/decode.md)."""
    rows = x_MD.shape[0]
    if x_MD.dtype == jnp.bfloat16:
        return on_two_rows(lambda x: _product(x, weight_ND), x_MD, axis=0)
    if 1 < rows <= MOST_SUMMED_ROWS:
        # XLA fuses this sum into one pass over the weights for all rows, at the speed of memory;
        # its product takes 1.5 times as long or more (and so does the sum with x as the first
        # factor). What makes x must not be fused too: it would be computed again for every output.
        x_MD = jax.lax.optimization_barrier(x_MD)
        return jnp.sum(weight_ND[None] * x_MD[:, None], axis=-1)
    return _product(x_MD, weight_ND)


def on_two_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> jax.Array:
    """`product(x)`, of a doubled row where x has one: 10 times faster in bfloat16 on a CPU.

    Of one row XLA makes a product of vectors there, for which it converts all weights first.
    """
    if x.shape[axis] > 1:
        return product(x)
    # Behind the barrier the two rows are made once, and not again wherever they are read.
    doubled = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=axis))
    return jax.lax.slice_in_dim(product(doubled), 0, 1, axis=axis)


def logits_of(params: Params, normed_BTD: jax.Array) -> jax.Array:
    """Normed states [B, T, D] to float32 logits [B, T, V], with prepared parameters."""
    return linear(normed_BTD, params.get("head", params["embedding"]))


def _qkv(
    config: ModelConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    B, T, _ = x_BTD.shape
    K, H = config.kv_heads, config.head_width
    fused = linear(x_BTD, weights["qkv"]).astype(x_BTD.dtype).reshape(B, T, K, -1, H)
    q_BKGTH = fused[:, :, :, :-2].transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = (fused[:, :, :, index].swapaxes(1, 2) for index in (-2, -1))
    return q_BKGTH.reshape(B, -1, T, H), k_BKTH, v_BKTH


def _output(weights: Weights, out_BNTH: jax.Array) -> jax.Array:
    B, N, T, H = out_BNTH.shape
    out_BTD = linear(out_BNTH.swapaxes(1, 2).reshape(B, T, N * H), weights["o"])
    return out_BTD.astype(out_BNTH.dtype)


def _swiglu(x_BTD: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    gate_BTF, up_BTF = jnp.split(linear(x_BTD, gate_up).astype(x_BTD.dtype), 2, axis=-1)
    return linear(jax.nn.silu(gate_BTF) * up_BTF, down).astype(x_BTD.dtype)


def _feed_forward(
    config: ModelConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics | None]:
    moe = config.moe
    if not moe.experts:
        return _swiglu(x_BTD, weights["gate_up"], weights["down"]), None
    choices = x_BTD.shape[0] * x_BTD.shape[1] * moe.experts_per_token
    return mixture_of_experts(
        moe,
        weights,
        x_BTD,
        gather_experts if choices <= moe.experts else apply_experts,
        lambda weights, x: _swiglu(x, weights["shared_gate_up"], weights["shared_down"]),
    )


PREPARED_LAYOUT = Products(_qkv, _output, _feed_forward)
"""The products of `apply_block` with prepared weights."""
