"""Mixture-of-experts feed-forward: a softmax router and dropless dispatch to SwiGLU experts.

Every token reaches every expert that it chose: rows are sorted by expert, multiplied group by group
(`grouped.py`), and put back. `expert_parallel.py` does this on several devices.

Axes: M tokens, X experts, k chosen experts of a token, P = M·k pairs of a token and one of its
experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.config import LoopConfig, MoEConfig
from plt_jax.model.grouped import GroupedProduct, grouped_product
from plt_jax.model.layers import Parameter, projection, silu_times, swiglu, zero_parameter

Weights = Mapping[str, jax.Array]

EXPERTS = {
    "expert_gate": ("expert", "embed", "ffn"),
    "expert_up": ("expert", "embed", "ffn"),
    "expert_down": ("expert", "ffn", "embed"),
}
"""The routed experts' weights with their logical axes, in the order in which they are applied."""


class RouterStatistics(NamedTuple):
    """Statistics of one router over one batch, float32; stacked, loops and layers lead."""

    load_X: jax.Array
    """Share of all choices that each expert worked on."""
    dropped: jax.Array
    """Share of all choices that no expert worked on. It is 0, whatever the loads are."""
    probability_X: jax.Array
    """Mean router probability of each expert; sums to 1."""
    squared_log_z: jax.Array
    """Mean squared log-normaliser of the router's softmax."""
    chosen_BTk: jax.Array
    """int32, the experts that each position chose."""


class Routing(NamedTuple):
    """A router's decisions about M tokens."""

    weight_Mk: jax.Array
    """float32, the weights of the chosen experts' outputs."""
    chosen_Mk: jax.Array
    """int32, the chosen experts."""
    probability_X: jax.Array
    squared_log_z: jax.Array
    """See RouterStatistics."""


RoutedExperts = Callable[[MoEConfig, Weights, jax.Array], tuple[jax.Array, RouterStatistics | None]]
"""Router and routed experts, [B, T, D] -> [B, T, D], and the statistics that training needs."""


def moe_parameters(moe: MoEConfig, loop: LoopConfig, D: int, depth: float) -> dict[str, Parameter]:
    """The feed-forward parameters of one mixture-of-experts layer.

    Args:
      D: model width.
      depth: factor on the initial scale of the output projections.
    """
    X, F, S = moe.experts, moe.expert_width, moe.shared_width
    sizes = {"expert": X, "embed": D, "ffn": F}
    parameters = {"router": projection((D, X), ("embed", None), D)}
    for name, axes in EXPERTS.items():
        scale = depth if name == "expert_down" else 1.0
        shape = tuple(sizes[axis] for axis in axes)
        parameters[name] = projection(shape, axes, sizes[axes[1]], scale)
    if moe.bias_update_rate is not None:
        # The router sees another distribution in each loop, and one bias could not balance all.
        parameters["router_bias"] = zero_parameter((loop.count, X), ("loops", None))
    if S:
        parameters |= {
            "shared_gate_proj": projection((D, S), ("embed", "ffn"), D),
            "shared_up": projection((D, S), ("embed", "ffn"), D),
            "shared_down": projection((S, D), ("ffn", "embed"), S, depth),
        }
    if moe.shared_gate:
        parameters["shared_router"] = projection((D, 1), ("embed", None), D)
    return parameters


def weights_of_loop(weights: Weights, loops: int | jax.Array) -> Weights:
    """A layer's weights in given loops: of the router's biases, which each loop has its own, those.

    Args:
      loops: the loop (0 for the first) of all positions, or int32 [T], the loop of each position.
    """
    if "router_bias" not in weights:
        return weights
    return {**weights, "router_bias": weights["router_bias"][loops]}


def route(moe: MoEConfig, weights: Weights, x_BTD: jax.Array) -> Routing:
    """Chooses k experts for each token, in float32; `router_bias` is [X] or [T, X]."""
    logits_BTX = float32_product(x_BTD, weights["router"])
    logits_MX = logits_BTX.reshape(-1, moe.experts)
    ranked_MX = logits_MX
    if "router_bias" in weights:
        biased_BTX = logits_BTX + jax.lax.stop_gradient(weights["router_bias"])
        ranked_MX = biased_BTX.reshape(-1, moe.experts)
    # Probabilities rank experts as logits do, whichever of the two is taken first.
    _, chosen_Mk = jax.lax.top_k(ranked_MX, moe.experts_per_token)
    probability_MX = jax.nn.softmax(logits_MX, axis=-1)
    if moe.routing == "softmax_then_topk" and not moe.renormalize:
        weight_Mk = jnp.take_along_axis(probability_MX, chosen_Mk, axis=-1)
    else:  # probabilities over their sum are the softmax over the chosen
        weight_Mk = jax.nn.softmax(jnp.take_along_axis(logits_MX, chosen_Mk, axis=-1), axis=-1)
    return Routing(
        weight_Mk,
        chosen_Mk,
        probability_X=jnp.mean(probability_MX, axis=0),
        squared_log_z=jnp.mean(jnp.square(jax.nn.logsumexp(logits_MX, axis=-1))),
    )


def float32_product(x_BTD: jax.Array, weight_DN: jax.Array) -> jax.Array:
    """A product in float32 throughout; by default, accelerators would round its operands."""
    weight_DN = weight_DN.astype(jnp.float32)
    return jnp.matmul(x_BTD.astype(jnp.float32), weight_DN, precision=jax.lax.Precision.HIGHEST)


def run_groups(
    swiglu: Callable[[jax.Array, jax.Array], jax.Array],
    experts: int,
    x_MD: jax.Array,
    expert_P: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Applies each pair's expert to its token: outputs [P, D], and rows per expert, int32 [X].

    Args:
      swiglu: `(rows [P, D] sorted by expert, rows per expert int32 [X]) -> [P, D]`.
      experts: the number of experts, X.
      expert_P: int32 expert of each pair. The pairs of one token are neighbours. X stands for no
        expert, and gives zero.
    """
    order_P = jnp.argsort(expert_P, stable=True)
    back_P = inverse(order_P)
    sizes_X = count_experts(expert_P, experts)
    out_PD = swiglu(permute(pair_rows(x_MD, expert_P.size), order_P, back_P), sizes_X)
    return permute(out_PD, back_P, order_P), sizes_X


def pair_rows(x_MD: jax.Array, pairs: int) -> jax.Array:
    """Repeats each token's row for each of its pairs, [P, D]."""
    return jnp.repeat(x_MD, pairs // x_MD.shape[0], axis=0)


@jax.custom_vjp
def permute(rows_PD: jax.Array, order_P: jax.Array, back_P: jax.Array) -> jax.Array:
    """Rows in another order. With the inverse at hand, the gradient is a gather too, no scatter."""
    return rows_PD[order_P]


permute.defvjp(
    lambda rows_PD, order_P, back_P: (rows_PD[order_P], back_P),
    lambda back_P, grad_PD: (grad_PD[back_P], None, None),
)


def expert_swiglu(
    product: GroupedProduct, weights: Weights, rows_PD: jax.Array, sizes_X: jax.Array
) -> jax.Array:
    """Applies the experts' SwiGLU to rows sorted by expert, [P, D], with the declared weights."""
    gate_XDF, up_XDF, down_XFD = (weights[name].astype(rows_PD.dtype) for name in EXPERTS)
    gate_PF, up_PF = product(rows_PD, gate_XDF, sizes_X), product(rows_PD, up_XDF, sizes_X)
    return product(silu_times(gate_PF, up_PF), down_XFD, sizes_X)


def count_experts(expert_P: jax.Array, experts: int) -> jax.Array:
    """Number of pairs of each of the first `experts` experts, int32 [X]."""
    return jnp.zeros(experts, jnp.int32).at[expert_P].add(1, mode="drop")


def inverse(order_P: jax.Array) -> jax.Array:
    """The permutation that undoes another."""
    index_P = jnp.arange(order_P.size, dtype=order_P.dtype)
    return jnp.zeros_like(order_P).at[order_P].set(index_P, unique_indices=True)


def weighted_sum(weight_Mk: jax.Array, out_PD: jax.Array) -> jax.Array:
    """Adds each token's pairs by their weights, [P, D] -> [M, D]."""
    out_MkD = out_PD.reshape(*weight_Mk.shape, -1)
    return jnp.einsum("Mk,MkD->MD", weight_Mk.astype(out_MkD.dtype), out_MkD)


def local_experts(
    moe: MoEConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics]:
    """`RoutedExperts` on one device."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(moe, weights, x_BTD)
    expert_P = routing.chosen_Mk.ravel()
    swiglu = partial(expert_swiglu, grouped_product(moe), weights)
    out_PD, sizes_X = run_groups(swiglu, moe.experts, x_MD, expert_P)
    out_BTD = weighted_sum(routing.weight_Mk, out_PD).reshape(x_BTD.shape)
    return out_BTD, statistics_of(routing, sizes_X, expert_P.size, x_BTD.shape)


def statistics_of(
    routing: Routing, sizes_X: jax.Array, choices: int, shape: tuple[int, ...]
) -> RouterStatistics:
    """A router's statistics.

    Args:
      sizes_X: number of rows that each expert worked on.
      choices: number of choices, P.
      shape: shape of the tokens, [B, T, D].
    """
    return RouterStatistics(
        load_X=sizes_X / choices,
        dropped=(choices - jnp.sum(sizes_X)) / choices,
        probability_X=routing.probability_X,
        squared_log_z=routing.squared_log_z,
        chosen_BTk=routing.chosen_Mk.reshape(*shape[:2], -1),
    )


def shared_expert(weights: Weights, x_BTD: jax.Array) -> jax.Array:
    """The SwiGLU expert that every token goes to, [B, T, D] -> [B, T, D]."""
    return swiglu(x_BTD, weights["shared_gate_proj"], weights["shared_up"], weights["shared_down"])


def mixture_of_experts(
    moe: MoEConfig,
    weights: Weights,
    x_BTD: jax.Array,
    routed: RoutedExperts = local_experts,
    shared: Callable[[Weights, jax.Array], jax.Array] = shared_expert,
) -> tuple[jax.Array, RouterStatistics | None]:
    """The chosen experts' weighted sum, plus the shared expert if there is one, [B, T, D].

    The shared expert does not depend on the routed ones, so that a compiler can compute it while
    tokens travel to the devices of their experts.
    """
    out_BTD, statistics = routed(moe, weights, x_BTD)
    if moe.shared_width:
        shared_BTD = shared(weights, x_BTD)
        if moe.shared_gate:
            share_BT1 = jax.nn.sigmoid(float32_product(x_BTD, weights["shared_router"]))
            shared_BTD = (share_BT1 * shared_BTD).astype(x_BTD.dtype)
        out_BTD += shared_BTD
    return out_BTD, statistics


def auxiliary_loss(moe: MoEConfig, routers: Sequence[RouterStatistics]) -> jax.Array:
    """The routers' load-balancing and z losses, weighted, averaged over loops and layers.

    Balance is X·Σ load·probability per router (Switch Transformer, equation 4): 1 when even.

    Args:
      routers: the statistics of all routers, in any number of arrays.
    """

    def losses(router: RouterStatistics) -> jax.Array:
        balance = moe.experts * jnp.sum(router.load_X * router.probability_X, axis=-1)
        return moe.load_balance_loss * balance + moe.router_z_loss * router.squared_log_z

    return mean_of_all([losses(router) for router in routers])


def mean_of_all(arrays: Sequence[jax.Array]) -> jax.Array:
    """The mean of all elements of several arrays."""
    return sum(map(jnp.sum, arrays), jnp.zeros(())) / sum(array.size for array in arrays)


def load_entropy(load_X: jax.Array) -> jax.Array:
    """Entropy of loads [..., X] over its maximum log X, in 0..1; 1 is even."""
    experts = load_X.shape[-1]
    if experts == 1:
        return jnp.ones(load_X.shape[:-1])
    entropy = -jnp.sum(load_X * jnp.log(jnp.maximum(load_X, 1e-9)), axis=-1)
    return entropy / math.log(experts)


def experts_per_step(chosen_LBTk: jax.Array) -> jax.Array:
    """Mean number of experts that a one-pass decode step of one sequence reads in a layer.

    The loops of a position are the rows of its step. They read k experts if they agree on all, and
    L·k if they agree on none.
    """
    chosen_BTP = jnp.moveaxis(chosen_LBTk, 0, -1).reshape(*chosen_LBTk.shape[1:3], -1)
    ordered_BTP = jnp.sort(chosen_BTP, axis=-1)
    repeated_BT = jnp.sum(ordered_BTP[..., 1:] == ordered_BTP[..., :-1], axis=-1)
    return jnp.mean(ordered_BTP.shape[-1] - repeated_BT)


def balance_step(moe: MoEConfig, load_X: jax.Array) -> jax.Array:
    """The change of the router's biases after a step, [..., X], by the loads of that step.

    Auxiliary-loss-free balancing (arXiv 2408.15664, Algorithm 1), on logits instead of scores, so
    that the rate means the same for any number of experts.
    """
    assert moe.bias_update_rate is not None  # else the model has no such biases
    return moe.bias_update_rate * jnp.sign(1.0 / moe.experts - load_X)
