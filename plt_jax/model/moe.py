"""Mixture-of-experts feed-forward: a softmax router and dropless dispatch to SwiGLU experts.

Every token reaches every expert it chose: rows are sorted by expert, multiplied group by group
(`jax.lax.ragged_dot`), and put back. M is the number of tokens, X of experts, k of those chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig, MoEConfig
from plt_jax.model.layers import Parameter, projection, swiglu

EXPERTS = ("expert_gate", "expert_up", "expert_down")
"""The routed experts' weights, in the order in which they are applied."""

ApplyExperts = Callable[[Mapping[str, jax.Array], jax.Array, jax.Array, jax.Array], jax.Array]


class RouterStatistics(NamedTuple):
    """What one router did with one batch, all float32; loops and layers lead where stacked."""

    load_X: jax.Array
    """Share of all choices that fell on each expert; sums to 1."""
    probability_X: jax.Array
    """Mean router probability of each expert; sums to 1."""
    squared_log_z: jax.Array
    """Mean squared log-normaliser of the router's softmax."""


def moe_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The feed-forward parameters of one mixture-of-experts layer."""
    moe, D = config.moe, config.width
    X, F, S = moe.experts, moe.expert_width, moe.shared_width
    depth = 1 / math.sqrt(2 * config.layers)  # as the dense layers' output projections
    into, out_of = ("expert", "embed", "ffn"), ("expert", "ffn", "embed")
    parameters = {
        "router": projection((D, X), ("embed", None), D),
        "expert_gate": projection((X, D, F), into, D),
        "expert_up": projection((X, D, F), into, D),
        "expert_down": projection((X, F, D), out_of, F, depth),
    }
    if S:
        parameters |= {
            "shared_gate_proj": projection((D, S), ("embed", "ffn"), D),
            "shared_up": projection((D, S), ("embed", "ffn"), D),
            "shared_down": projection((S, D), ("ffn", "embed"), S, depth),
        }
    if moe.shared_gate:
        parameters["shared_router"] = projection((D, 1), ("embed", None), D)
    return parameters


def route(
    moe: MoEConfig, router_DX: jax.Array, x_MD: jax.Array
) -> tuple[jax.Array, jax.Array, RouterStatistics]:
    """Each token's k experts and their weights, [M, k] float32 and int32; all in float32."""
    logits_MX = x_MD.astype(jnp.float32) @ router_DX.astype(jnp.float32)
    probability_MX = jax.nn.softmax(logits_MX, axis=-1)
    if moe.routing == "softmax_then_topk":
        weight_Mk, chosen_Mk = jax.lax.top_k(probability_MX, moe.experts_per_token)
        if moe.renormalize:
            weight_Mk /= jnp.sum(weight_Mk, axis=-1, keepdims=True)
    else:
        top_Mk, chosen_Mk = jax.lax.top_k(logits_MX, moe.experts_per_token)
        weight_Mk = jax.nn.softmax(top_Mk, axis=-1)
    statistics = RouterStatistics(
        load_X=jnp.bincount(chosen_Mk.ravel(), length=moe.experts) / chosen_Mk.size,
        probability_X=jnp.mean(probability_MX, axis=0),
        squared_log_z=jnp.mean(jnp.square(jax.nn.logsumexp(logits_MX, axis=-1))),
    )
    return weight_Mk, chosen_Mk, statistics


def apply_experts(
    weights: Mapping[str, jax.Array], x_MD: jax.Array, weight_Mk: jax.Array, chosen_Mk: jax.Array
) -> jax.Array:
    """Sum over each token's chosen experts of weight x SwiGLU, [M, D] in x's dtype."""
    M, k = chosen_Mk.shape
    gate_XDF, up_XDF, down_XFD = (weights[name].astype(x_MD.dtype) for name in EXPERTS)
    order = jnp.argsort(chosen_Mk.ravel(), stable=True)
    rows = x_MD[order // k]
    sizes_X = jnp.bincount(chosen_Mk.ravel(), length=gate_XDF.shape[0]).astype(jnp.int32)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate_XDF, sizes_X))
    hidden *= jax.lax.ragged_dot(rows, up_XDF, sizes_X)
    out = jax.lax.ragged_dot(hidden, down_XFD, sizes_X)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    out_MkD = out[back].reshape(M, k, -1)
    return jnp.einsum("Mk,MkD->MD", weight_Mk.astype(out.dtype), out_MkD)


def gather_experts(
    weights: Mapping[str, jax.Array], x_MD: jax.Array, weight_Mk: jax.Array, chosen_Mk: jax.Array
) -> jax.Array:
    """As `apply_experts`, by reading the chosen experts' weights alone: for few tokens.

    A grouped product reads (and on a CPU multiplies) every expert, whoever chose it.
    """
    gate_MkDF, up_MkDF, down_MkFD = (
        weights[name].astype(x_MD.dtype)[chosen_Mk] for name in EXPERTS
    )
    hidden_MkF = jax.nn.silu(jnp.einsum("MD,MkDF->MkF", x_MD, gate_MkDF))
    hidden_MkF *= jnp.einsum("MD,MkDF->MkF", x_MD, up_MkDF)
    out_MkD = jnp.einsum("MkF,MkFD->MkD", hidden_MkF, down_MkFD)
    return jnp.einsum("Mk,MkD->MD", weight_Mk.astype(out_MkD.dtype), out_MkD)


def shared_expert(weights: Mapping[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """The SwiGLU expert that every token goes to, [B, T, D] -> [B, T, D]."""
    return swiglu(x_BTD, weights["shared_gate_proj"], weights["shared_up"], weights["shared_down"])


def mixture_of_experts(
    moe: MoEConfig,
    weights: Mapping[str, jax.Array],
    x_BTD: jax.Array,
    apply_chosen: ApplyExperts = apply_experts,
    apply_shared: Callable[[Mapping[str, jax.Array], jax.Array], jax.Array] = shared_expert,
) -> tuple[jax.Array, RouterStatistics]:
    """The chosen experts' weighted sum, plus the shared expert if there is one, [B, T, D].

    Args:
      apply_chosen: the routed experts' product, with the arguments of `apply_experts`.
      apply_shared: the shared expert's product.
    """
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    weight_Mk, chosen_Mk, statistics = route(moe, weights["router"], x_MD)
    out_MD = apply_chosen(weights, x_MD, weight_Mk, chosen_Mk)
    out_BTD = out_MD.reshape(x_BTD.shape)
    if moe.shared_width:
        shared_BTD = apply_shared(weights, x_BTD)
        if moe.shared_gate:
            share_BT1 = jax.nn.sigmoid(x_BTD.astype(jnp.float32) @ weights["shared_router"])
            shared_BTD = (share_BT1 * shared_BTD).astype(x_BTD.dtype)
        out_BTD += shared_BTD
    return out_BTD, statistics


def auxiliary_loss(moe: MoEConfig, statistics: RouterStatistics) -> jax.Array:
    """The routers' load-balancing and z losses, weighted, averaged over loops and layers.

    Balance is X·Σ load·probability per router (Switch Transformer, equation 4): 1 when even.
    """
    balance = moe.experts * jnp.sum(statistics.load_X * statistics.probability_X, axis=-1)
    return jnp.mean(moe.load_balance_loss * balance + moe.router_z_loss * statistics.squared_log_z)


def load_entropy(statistics: RouterStatistics) -> jax.Array:
    """Entropy of the routers' loads over its maximum log X, in 0..1, averaged; 1 is even."""
    load_X = statistics.load_X
    entropy = -jnp.sum(load_X * jnp.log(jnp.maximum(load_X, 1e-9)), axis=-1)
    return jnp.mean(entropy) / math.log(max(load_X.shape[-1], 2))
