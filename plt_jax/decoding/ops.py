"""The products of a layer, and of the head, with decode weights."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig, MoEConfig
from plt_jax.decoding.linear import linear
from plt_jax.decoding.quantization import Quantized, dequantize_params
from plt_jax.decoding.weights import EXPERT_AXES, DecodeWeights, Weights
from plt_jax.model.attention import norm_heads
from plt_jax.model.block import LayerOps, project_and_attend
from plt_jax.model.expert_parallel import replicate_rows
from plt_jax.model.grouped import grouped_product
from plt_jax.model.kernels import traced_platform
from plt_jax.model.layers import Rotation, embed, rms_norm, rotate
from plt_jax.model.looping import Norm
from plt_jax.model.moe import RouterStatistics, mixture_of_experts, run_groups, weighted_sum

FEW_ROWS = 64
"""Up to this number of rows, each expert that any row chose multiplies all rows, unsorted."""


def embed_tokens(weights: DecodeWeights, tokens_BT: jax.Array, dtype: jnp.dtype | str) -> jax.Array:
    """Rows of the embedding, [B, T] -> [B, T, D] in the compute dtype."""
    table = weights.embedding
    if isinstance(table, Quantized):
        rows = jax.tree.map(lambda array: array[tokens_BT], table)
        return rows.dequantized(jnp.dtype(dtype))
    return embed(tokens_BT, table, jnp.dtype(dtype))


class Norms(NamedTuple):
    """The norms outside of the layers, [..., D] -> [..., D]."""

    final: Norm
    between_loops: Norm


def norms_of(config: ModelConfig, weights: DecodeWeights) -> Norms:
    """The final norm, and the norm between loops, which often is the same."""
    final = partial(rms_norm, scale=weights.final_norm, epsilon=config.norm_epsilon)
    if weights.loop_norm is None:
        return Norms(final, final)
    return Norms(final, partial(rms_norm, scale=weights.loop_norm, epsilon=config.norm_epsilon))


def hidden_scale_of(config: ModelConfig, weights: DecodeWeights) -> float | jax.Array:
    """The scale b of the previous loop's output, or its scales by channel, [D]."""
    return config.loop.hidden_scale if weights.hidden_scale is None else weights.hidden_scale


def head_logits(weights: DecodeWeights, normed_BTD: jax.Array) -> jax.Array:
    """The head: normed states [B, T, D] to float32 logits [B, T, V]."""
    return linear(normed_BTD, weights.embedding if weights.head is None else weights.head)


def joined_qkv(config: ModelConfig, weights: Weights, x_BTD: jax.Array) -> jax.Array:
    """The projections of normed input [B, T, D], neither normed nor rotated, [B, T, K, G+2, H]: of
    each key/value head its G queries, its key and its value."""
    joined = linear(x_BTD, weights["qkv"]).astype(x_BTD.dtype)
    joined = joined.reshape(*x_BTD.shape[:2], config.kv_heads, -1, config.head_width)
    return joined + weights["qkv_bias"].astype(x_BTD.dtype) if config.qkv_bias else joined


def _qkv(
    config: ModelConfig, weights: Weights, x_BTD: jax.Array, rotation: Rotation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Does what `model.attention.rotated_qkv` does, of the queries and keys in one piece."""
    B, T, _ = x_BTD.shape
    H = config.head_width
    fused_BKxTH = joined_qkv(config, weights, x_BTD).transpose(0, 2, 3, 1, 4)
    qk_BKxTH, v_BKTH = fused_BKxTH[:, :, :-1], fused_BKxTH[:, :, -1]
    if config.qk_norm and config.qk_norm_over == "all_heads":
        q_BNTH, k_BKTH = qk_BKxTH[:, :, :-1].reshape(B, -1, T, H), qk_BKxTH[:, :, -1]
        q_BNTH = norm_heads(config, q_BNTH, weights["q_norm"])
        k_BKTH = norm_heads(config, k_BKTH, weights["k_norm"])
        return rotate(q_BNTH, rotation), rotate(k_BKTH, rotation), v_BKTH
    if config.qk_norm:
        qk_BKxTH = rms_norm(qk_BKxTH, weights["qk_norm"], config.norm_epsilon)
    qk_BKxTH = rotate(qk_BKxTH, Rotation(rotation.cos[:, None], rotation.sin[:, None]))
    return qk_BKxTH[:, :, :-1].reshape(B, -1, T, H), qk_BKxTH[:, :, -1], v_BKTH


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
    """Applies the chosen experts to a few rows, [M, D]; reads each expert that any row chose once.

    Loops of a token that choose the same expert share it. A GPU reads as many experts as the rows
    could have chosen.
    """
    M, X = x_MD.shape[0], experts["expert_down"].shape[0]
    rows_M1 = jnp.arange(M)[:, None]
    # There is one column more than experts: rows outside of this device fall on it.
    share_MX = jnp.zeros((M, X + 1), jnp.float32)
    share_MX = share_MX.at[rows_M1, chosen_Mk].add(weight_Mk, mode="drop").at[:, X].set(0.0)
    used_X = jnp.zeros(X, bool).at[chosen_Mk].set(True, mode="drop")
    most = min(X, chosen_Mk.size)
    (used,) = jnp.nonzero(used_X, size=most, fill_value=X)
    # GPUs ask the host before each turn of a loop whose turns are counted on the device.
    turns = most if traced_platform() == "gpu" else jnp.sum(used_X)
    x_MD = jax.lax.optimization_barrier(x_MD)

    def add_expert(index: jax.Array, out_MD: jax.Array) -> jax.Array:
        gate_up_2FD, down_DF = jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(array, used[index], keepdims=False),
            [experts[name] for name in EXPERT_AXES],
        )
        made_MD = _swiglu(x_MD, gate_up_2FD, down_DF).astype(jnp.float32)
        return out_MD + share_MX[:, used[index], None] * made_MD

    out_MD = jnp.zeros(x_MD.shape, jnp.float32)
    out_MD = jax.lax.fori_loop(0, turns, add_expert, out_MD)
    return out_MD.astype(x_MD.dtype)


def many_experts(
    moe: MoEConfig, experts: Weights, x_MD: jax.Array, weight_Mk: jax.Array, chosen_Mk: jax.Array
) -> jax.Array:
    """Applies the chosen experts to many rows, [M, D], by grouped products over the experts.

    There is no grouped product of whole numbers, so Quantized weights are written out for it.
    """
    product = partial(grouped_product(moe), outputs_first=True)
    experts = dequantize_params(experts, x_MD.dtype)
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


DECODE_OPS = LayerOps(partial(project_and_attend, _qkv), _output, _feed_forward)
"""The products of `apply_block` with decode weights."""
