"""Weights laid out for decoding, and the products with them.

A decode step reads every weight once and multiplies it with a few rows, so what it costs is how
fast weights come out of memory. Layers are separate arrays, since slices of stacked ones would be
copies; products of one input are fused; and every weight lies outputs first, [N, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig, MoEConfig
from plt_jax.distributed.axes import (
    batch_axes,
    current_axes,
    dividing_axes,
    mesh_is_active,
    shard,
    unboxed,
)
from plt_jax.model.block import Products, stacks_of
from plt_jax.model.expert_parallel import replicate_rows
from plt_jax.model.grouped import grouped_product
from plt_jax.model.kernels import traced_platform
from plt_jax.model.moe import RouterStatistics, mixture_of_experts, run_groups, weighted_sum

Params = dict[str, Any]
Weights = Mapping[str, jax.Array]

# Beyond these rows a CPU is bound by arithmetic, and the fused sum no better than a product.
# Processes that ran such sums on jax 0.10 crashed now and then, in XLA's threads.
MOST_SUMMED_ROWS = 256 if jax.__version_info__ >= (0, 12) else 0

# Up to these rows every expert that is chosen at all multiplies all rows, and none is sorted.
FEW_ROWS = 64


def prepare_for_decode(config: ModelConfig, params: Params) -> Params:
    """Parameters laid out for decoding; do this once, outside jit.

    Args:
      params: as `Transformer.init` gives them, boxed or not; prepared ones are returned as they
        are.

    Returns:
      "embedding" [V, D], "head" [V, D] unless tied, "final_norm" [D], and "layers", a tuple of one
      dict per layer: the declared norms, biases, gate and router as they are, and in the compute
      dtype "qkv" [K·(G+2)·H, D] (each key/value head behind the G query heads that read it), "o"
      [D, N·H], and "gate_up" [2, F, D] and "down" [D, F], or the experts' "expert_gate_up"
      [X, 2, F, D] and "expert_down" [X, D, F] and the shared expert's "shared_gate_up" and
      "shared_down". Under a mesh they lie as PREPARED_AXES says.
    """
    if isinstance(params["layers"], tuple):
        return params
    params = unboxed(params)
    return _prepare_on_mesh(config, params) if mesh_is_active() else _prepare(config, params)


def _prepare(config: ModelConfig, params: Params) -> Params:
    dtype = jnp.dtype(config.dtype)
    prepared = {
        "embedding": _placed("embedding", params["embedding"].astype(dtype)),
        "final_norm": _placed("final_norm", params["final_norm"]),
        "layers": tuple(
            _prepare_layer(config, {name: stacked[j] for name, stacked in params[part].items()})
            for part, stack in stacks_of(config).items()
            for j in range(stack.layers)
        ),
    }
    if "head" in params:
        prepared["head"] = _placed("head", params["head"].astype(dtype).T)
    return prepared


_prepare_on_mesh = jax.jit(_prepare, static_argnums=0)


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
            fused |= {fused_in: jnp.stack(both), fused_out: down_FD.astype(dtype).T}
    if "expert_gate" in left:
        both = [
            left.pop(name).astype(dtype).swapaxes(1, 2) for name in ("expert_gate", "expert_up")
        ]
        fused["expert_gate_up"] = jnp.stack(both, axis=1)
        fused["expert_down"] = left.pop("expert_down").astype(dtype).swapaxes(1, 2)
    return {name: _placed(name, weight) for name, weight in (left | fused).items()}


PREPARED_AXES = {
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
"""The logical axes of the prepared weights; each device has all of the others whole."""

EXPERT_AXES = {name: PREPARED_AXES[name] for name in ("expert_gate_up", "expert_down")}


def _placed(name: str, weight: jax.Array) -> jax.Array:
    """A prepared weight in its place on the current mesh; a side that does not divide by all of its
    axes is split over those that it divides by."""
    if not mesh_is_active():
        return weight
    axes = PREPARED_AXES.get(name, ())
    sides = zip(axes, weight.shape, strict=False)
    return shard(
        weight, *(axis and dividing_axes(current_axes(axis), size) for axis, size in sides)
    )


def lay_rows(x_BTD: jax.Array) -> jax.Array:
    """States laid out for products with prepared weights: split by sequence where those are not."""
    if not mesh_is_active():
        return x_BTD
    return shard(x_BTD, batch_axes(x_BTD.shape[0], "decode_batch"))


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] times a prepared weight [N, D] or [2, F, D], summed and returned in float32, the
    weight's leading axes behind those of x."""
    rows_MD, outputs = x.reshape(-1, x.shape[-1]), weight.shape[:-1]
    if not mesh_is_active():
        # CPUs have a fast product with a matrix alone; but a side that devices split cannot be
        # folded behind another without being gathered.
        weight = weight.reshape(-1, weight.shape[-1])
    out = jax.lax.platform_dependent(rows_MD, weight, cpu=_linear_on_cpu, default=_product)
    return out.reshape(*x.shape[:-1], *outputs)


def _product(x_MD: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("MD,...D->M...", x_MD, weight, preferred_element_type=jnp.float32)


def _linear_on_cpu(x_MD: jax.Array, weight: jax.Array) -> jax.Array:
    """The fastest form that XLA has for few rows on a CPU (benchmarks/results/decode.md)."""
    rows = x_MD.shape[0]
    if x_MD.dtype == jnp.bfloat16:
        return on_two_rows(lambda x: _product(x, weight), x_MD, axis=0)
    if 1 < rows <= MOST_SUMMED_ROWS:
        # XLA fuses this sum into one pass over the weights for all rows, at the speed of memory;
        # its product takes 1.5 times as long or more (and so does the sum with x as the first
        # factor). What makes x must not be fused too: it would be computed again for every output.
        # And where a step uses a weight twice, as passes of a loop do, XLA would write one copy of
        # it for every row, and read that in both: behind one barrier with x its uses are not alike.
        x_MD, weight = jax.lax.optimization_barrier((x_MD, weight))
        x = jnp.expand_dims(x_MD, range(1, weight.ndim))
        return jnp.sum(weight[None] * x, axis=-1)
    return _product(x_MD, weight)


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
    made_BT2F = linear(x_BTD, gate_up).astype(x_BTD.dtype)
    hidden_BTF = jax.nn.silu(made_BT2F[..., 0, :]) * made_BT2F[..., 1, :]
    return linear(hidden_BTF, down).astype(x_BTD.dtype)


def few_experts(
    experts: Weights, x_MD: jax.Array, weight_Mk: jax.Array, chosen_Mk: jax.Array
) -> jax.Array:
    """Few rows through their experts, [M, D], by reading once each expert that any of them chose.

    So a step reads what its rows need: where a token's loops agree on an expert, they share it. (A
    GPU reads as many experts as they could have chosen.)
    """
    M, X = x_MD.shape[0], experts["expert_down"].shape[0]
    rows_M1 = jnp.arange(M)[:, None]
    # Of one expert more, which none chooses.
    share_MX = jnp.zeros((M, X + 1), jnp.float32)
    share_MX = share_MX.at[rows_M1, chosen_Mk].add(weight_Mk, mode="drop").at[:, X].set(0.0)
    used_X = jnp.zeros(X, bool).at[chosen_Mk].set(True, mode="drop")
    most = min(X, chosen_Mk.size)
    (used,) = jnp.nonzero(used_X, size=most, fill_value=X)
    # GPUs ask the host before each turn of a loop whose turns are counted on the device.
    turns = most if traced_platform() == "gpu" else jnp.sum(used_X)
    x_MD = jax.lax.optimization_barrier(x_MD)

    def add_expert(index: jax.Array, out_MD: jax.Array) -> jax.Array:
        gate_up_2FD, down_DF = (
            jax.lax.dynamic_index_in_dim(experts[name], used[index], keepdims=False)
            for name in EXPERT_AXES
        )
        made_MD = _swiglu(x_MD, gate_up_2FD, down_DF).astype(jnp.float32)
        return out_MD + share_MX[:, used[index], None] * made_MD

    out_MD = jnp.zeros(x_MD.shape, jnp.float32)
    out_MD = jax.lax.fori_loop(0, turns, add_expert, out_MD)
    return out_MD.astype(x_MD.dtype)


def many_experts(
    moe: MoEConfig, experts: Weights, x_MD: jax.Array, weight_Mk: jax.Array, chosen_Mk: jax.Array
) -> jax.Array:
    """As `few_experts`, by grouped products of the rows of each expert."""
    product = partial(grouped_product(moe), outputs_first=True)
    X, _, F, D = experts["expert_gate_up"].shape
    gate_up_XND = experts["expert_gate_up"].reshape(X, 2 * F, D)

    def expert_swiglu(rows_PD: jax.Array, sizes_X: jax.Array) -> jax.Array:
        gate_PF, up_PF = jnp.split(product(rows_PD, gate_up_XND, sizes_X), 2, axis=-1)
        return product(jax.nn.silu(gate_PF) * up_PF, experts["expert_down"], sizes_X)

    out_PD, _ = run_groups(expert_swiglu, X, x_MD, chosen_Mk.ravel())
    return weighted_sum(weight_Mk, out_PD)


def _routed_experts(
    moe: MoEConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics | None]:
    few = x_BTD.shape[0] * x_BTD.shape[1] <= FEW_ROWS
    run = few_experts if few else partial(many_experts, moe)
    return replicate_rows(moe, weights, EXPERT_AXES, run, x_BTD), None


def _feed_forward(
    config: ModelConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics | None]:
    if "router" not in weights:
        return _swiglu(x_BTD, weights["gate_up"], weights["down"]), None

    def shared(weights: Weights, x_BTD: jax.Array) -> jax.Array:
        return _swiglu(x_BTD, weights["shared_gate_up"], weights["shared_down"])

    return mixture_of_experts(config.moe, weights, x_BTD, _routed_experts, shared)


PREPARED_LAYOUT = Products(_qkv, _output, _feed_forward)
"""The products of `apply_block` with prepared weights."""
