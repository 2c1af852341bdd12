"""Grouped-query attention and its gated sliding-window form (G-SWA, Algorithm 3 of the PLT paper).

Arrays are named by axis: B sequences, T queries, S keys, N query heads, K key/value heads,
G = N / K query heads per key/value head, H head width, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.model.layers import (
    Parameter,
    Rotation,
    projection,
    rms_norm,
    rotate,
    scale_parameter,
    zero_parameter,
)

# Far below any logit, yet finite: a float32 softmax gives such keys a weight of exactly zero, and
# so an exactly zero gradient, without the NaN that a row of infinities would make.
MASKED = -1e30
MIN_BLOCK = 32  # Smaller blocks of windowed attention cost more in overhead than they save.


def attention_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The attention parameters of one layer."""
    D, N, K, H = config.width, config.heads, config.kv_heads, config.head_width
    parameters = {
        "attention_norm": scale_parameter(D, "embed"),
        "q": projection((D, N, H), ("embed", "heads", "head"), D),
        "k": projection((D, K, H), ("embed", "kv_heads", "head"), D),
        "v": projection((D, K, H), ("embed", "kv_heads", "head"), D),
        # Residual branches start smaller with depth, so that their sum starts at a fixed scale.
        "o": projection(
            (N, H, D), ("heads", "head", "embed"), N * H, 1 / math.sqrt(2 * config.layers)
        ),
    }
    if config.qk_norm:
        parameters["q_norm"] = scale_parameter(H, "head")
        parameters["k_norm"] = scale_parameter(H, "head")
    if config.loop.later_attention == "gated":
        parameters |= gate_parameters(config)
    return parameters


def gate_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The G-SWA gate of one layer, shared by all loops > 1; zero, so that it starts at 1/2."""
    D, N, H = config.width, config.heads, config.head_width
    bias = {"gate_bias": zero_parameter((N,), ("heads",))}
    if config.loop.gate_input == "query":
        return bias | {"gate_weight": zero_parameter((N, H), ("heads", "head"))}
    return bias | {
        "gate_norm": scale_parameter(D, "embed"),
        "gate_weight": zero_parameter((D, N), ("embed", "heads")),
    }


def project_qkv(
    config: ModelConfig, weights: Mapping[str, jax.Array], x_BTD: jax.Array, rotation: Rotation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] of normed inputs."""
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.einsum("BTD,DNH->BTNH", x_BTD, weights[name].astype(x_BTD.dtype)) for name in "qkv"
    )
    if config.qk_norm:
        q_BTNH = rms_norm(q_BTNH, weights["q_norm"], config.norm_epsilon)
        k_BTKH = rms_norm(k_BTKH, weights["k_norm"], config.norm_epsilon)
    return rotate(q_BTNH, rotation), rotate(k_BTKH, rotation), v_BTKH


def gate(
    config: ModelConfig, weights: Mapping[str, jax.Array], x_BTD: jax.Array, q_BTNH: jax.Array
) -> jax.Array | None:
    """The weight of G-SWA's global branch, float32 in (0, 1) [B, T, N]; None without a gate.

    Args:
      x_BTD: the layer's input before its norm.
      q_BTNH: the rotated queries.
    """
    if config.loop.later_attention != "gated":
        return None
    weight = weights["gate_weight"]
    if config.loop.gate_input == "query":
        score = jnp.einsum("BTNH,NH->BTN", q_BTNH.astype(jnp.float32), weight)
    else:
        normed_BTD = rms_norm(x_BTD.astype(jnp.float32), weights["gate_norm"], config.norm_epsilon)
        score = jnp.einsum("BTD,DN->BTN", normed_BTD, weight)
    return jax.nn.sigmoid(score + weights["gate_bias"])


def blend(gate_BTN: jax.Array, global_BTNH: jax.Array, local_BTNH: jax.Array) -> jax.Array:
    """G-SWA's output g·global + (1 - g)·local, in the branches' dtype."""
    g = gate_BTN[..., None]
    return (g * global_BTNH + (1.0 - g) * local_BTNH).astype(global_BTNH.dtype)


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention of queries to the keys that a mask allows; softmax in float32.

    Args:
      mask_BTS: bool, broadcastable to [B, T, S]; every query needs one allowed key.

    Returns:
      [B, T, N, H] in the dtype of the queries.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS / math.sqrt(H), MASKED)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def causal_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, documents_BT: jax.Array | None
) -> jax.Array:
    """Attention of every position to itself and all earlier ones of its document."""
    T = q_BTNH.shape[1]
    return _attention_within(q_BTNH, k_BTKH, v_BTKH, documents_BT, window=T)


def windowed_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    documents_BT: jax.Array | None,
    window: int,
) -> jax.Array:
    """Attention of every position to the last `window` keys of its document, itself included.

    Work and memory grow as T·window: each block of queries meets its own block of keys and the one
    before, which together hold every key of its windows.
    """
    B, T = q_BTNH.shape[:2]
    block = max(window - 1, MIN_BLOCK)
    if 2 * block >= T:  # Two blocks of keys are all keys.
        return _attention_within(q_BTNH, k_BTKH, v_BTKH, documents_BT, window)
    if documents_BT is None:
        documents_BT = jnp.zeros((B, T), jnp.int32)
    padding = -T % block
    blocks = (T + padding) // block

    def to_blocks(x: jax.Array, fill: int = 0) -> jax.Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(B, blocks, block, *x.shape[2:])

    def with_previous(x: jax.Array, fill: int = 0) -> jax.Array:
        first = jnp.full_like(x[:, :1], fill)
        pairs = jnp.concatenate([jnp.concatenate([first, x[:, :-1]], axis=1), x], axis=2)
        return pairs.reshape(B * blocks, 2 * block, *x.shape[3:])

    # Blocks become batch rows; -1 marks the key documents of the block before the first.
    query_documents = to_blocks(documents_BT)
    key_documents = with_previous(query_documents, fill=-1)
    distance = (block + jnp.arange(block))[:, None] - jnp.arange(2 * block)[None, :]
    mask = (distance >= 0) & (distance < window)
    mask = mask & (query_documents.reshape(-1, block, 1) == key_documents[:, None, :])
    out = masked_attention(
        to_blocks(q_BTNH).reshape(B * blocks, block, *q_BTNH.shape[2:]),
        with_previous(to_blocks(k_BTKH)),
        with_previous(to_blocks(v_BTKH)),
        mask,
    )
    return out.reshape(B, blocks * block, *q_BTNH.shape[2:])[:, :T]


def _attention_within(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    documents_BT: jax.Array | None,
    window: int,
) -> jax.Array:
    index = jnp.arange(q_BTNH.shape[1])
    distance = index[:, None] - index[None, :]
    mask_BTS = ((distance >= 0) & (distance < window))[None]
    if documents_BT is not None:
        mask_BTS = mask_BTS & (documents_BT[:, :, None] == documents_BT[:, None, :])
    return masked_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS)
