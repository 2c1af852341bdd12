"""Grouped-query attention and its gated sliding-window form (G-SWA, Algorithm 3 of the PLT paper).

Arrays are named by axis: B sequences, T queries, S keys, N query heads, K key/value heads,
G = N / K query heads per key/value head, H head width, D model width. Heads come before positions:
the batched products of attention then need no transposed copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.errors import InputError
from plt_jax.model.kernels import Backend, available_kernel, cudnn_attention, splash_attention
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
MIN_BLOCK = 64  # Smaller blocks of queries cost more in overhead than they save in products.
MAX_BLOCKS = 8  # Of causal attention; each is compiled by itself. 8 skip 7/16 of all products.


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
    if config.qkv_bias:
        parameters["q_bias"] = zero_parameter((N, H), ("heads", "head"))
        parameters["k_bias"] = zero_parameter((K, H), ("kv_heads", "head"))
        parameters["v_bias"] = zero_parameter((K, H), ("kv_heads", "head"))
    if config.output_bias:
        parameters["o_bias"] = zero_parameter((D,), ("embed",))
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
    config: ModelConfig, weights: Mapping[str, jax.Array], x_BTD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, N, T, H], keys and values [B, K, T, H] as the weights make them."""
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.einsum("BTD,DNH->BNTH", x_BTD, weights[name].astype(x_BTD.dtype)) for name in "qkv"
    )
    return q_BNTH, k_BKTH, v_BKTH


def project_output(weights: Mapping[str, jax.Array], out_BNTH: jax.Array) -> jax.Array:
    """The heads' outputs to [B, T, D]."""
    return jnp.einsum("BNTH,NHD->BTD", out_BNTH, weights["o"].astype(out_BNTH.dtype))


def finish_qkv(
    config: ModelConfig,
    weights: Mapping[str, jax.Array],
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    rotation: Rotation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What follows the products: biases, norms of queries and keys, and their rotation."""
    q_BNTH, k_BKTH, v_BKTH = qkv
    if config.qkv_bias:
        q_BNTH, k_BKTH, v_BKTH = (
            x_BNTH + weights[name][:, None].astype(x_BNTH.dtype)
            for x_BNTH, name in ((q_BNTH, "q_bias"), (k_BKTH, "k_bias"), (v_BKTH, "v_bias"))
        )
    if config.qk_norm:
        q_BNTH = rms_norm(q_BNTH, weights["q_norm"], config.norm_epsilon)
        k_BKTH = rms_norm(k_BKTH, weights["k_norm"], config.norm_epsilon)
    return rotate(q_BNTH, rotation), rotate(k_BKTH, rotation), v_BKTH


def gate(
    config: ModelConfig, weights: Mapping[str, jax.Array], x_BTD: jax.Array, q_BNTH: jax.Array
) -> jax.Array | None:
    """The weight of G-SWA's global branch, float32 in (0, 1) [B, N, T]; None without a gate.

    Args:
      x_BTD: the layer's input before its norm.
      q_BNTH: the rotated queries.
    """
    if config.loop.later_attention != "gated":
        return None
    weight = weights["gate_weight"]
    if config.loop.gate_input == "query":
        score_BNT = jnp.einsum("BNTH,NH->BNT", q_BNTH.astype(jnp.float32), weight)
    else:
        normed_BTD = rms_norm(x_BTD.astype(jnp.float32), weights["gate_norm"], config.norm_epsilon)
        score_BNT = jnp.einsum("BTD,DN->BNT", normed_BTD, weight)
    return jax.nn.sigmoid(score_BNT + weights["gate_bias"][:, None])


def blend(gate_BNT: jax.Array, global_BNTH: jax.Array, local_BNTH: jax.Array) -> jax.Array:
    """G-SWA's output g·global + (1 - g)·local, in the branches' dtype."""
    g = gate_BNT[..., None]
    return (g * global_BNTH + (1.0 - g) * local_BNTH).astype(global_BNTH.dtype)


def choose_backend(config: ModelConfig) -> Backend:
    """What computes attention over whole sequences: `config.attention`, with auto made definite.

    Raises:
      InputError: the devices that the program is traced for cannot run what the configuration asks.
    """
    available = available_kernel()
    if config.attention == "auto":
        refused = available == "cudnn" and config.cudnn_obstacle is not None
        return "xla" if refused else available
    if config.attention not in ("xla", available):
        needed = {"cudnn": "an NVIDIA GPU of compute capability 8.0 or above", "splash": "a TPU"}
        raise InputError(
            f"model.attention is {config.attention}, which needs {needed[config.attention]}; "
            "set it to auto or xla"
        )
    return config.attention


def sequence_attention(
    config: ModelConfig,
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    documents_BT: jax.Array | None,
    window: int | None = None,
) -> jax.Array:
    """Causal attention over whole sequences, [B, N, T, H] in the dtype of the queries.

    Args:
      documents_BT: int32 numbers of documents, whose borders nothing crosses; None if each row is
        one document.
      window: number of keys that a position sees, itself included; None for all earlier ones.

    Raises:
      InputError: see `choose_backend`.
    """
    backend = choose_backend(config)
    if backend == "splash":
        return splash_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, window)
    # cuDNN knows documents only as a [T, T] bias, beside which it has no windows before 9.10.2. The
    # blocks below take both, and no memory that grows as T·T.
    if backend == "cudnn" and (window is None or documents_BT is None):
        return cudnn_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, window)
    if window is None:
        return causal_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT)
    return windowed_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, window)


def masked_attention(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention of queries to the keys that a mask allows; softmax in float32.

    Args:
      mask_BTS: bool, broadcastable to [B, T, S]; every query needs one allowed key.

    Returns:
      [B, N, T, H] in the dtype of the queries.
    """
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T, H)
    logits_BKGTS = jnp.einsum(
        "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
    )
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS / math.sqrt(H), MASKED)
    # The softmax's denominator divides the [T, H] outputs instead of the [T, S] weights. Its result
    # does not depend on the maximum, so neither does the gradient.
    largest = jax.lax.stop_gradient(jnp.max(logits_BKGTS, axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp(logits_BKGTS - largest)
    out_BKGTH = jnp.einsum(
        "BKGTS,BKSH->BKGTH",
        weights_BKGTS.astype(v_BKSH.dtype),
        v_BKSH,
        preferred_element_type=jnp.float32,
    )
    out_BKGTH /= jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    return out_BKGTH.astype(q_BNTH.dtype).reshape(B, N, T, H)


def causal_attention(
    q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, documents_BT: jax.Array | None
) -> jax.Array:
    """Attention of every position to itself and all earlier ones of its document, [B, N, T, H].

    Each block of queries meets only the keys up to its own end.
    """
    T = q_BNTH.shape[2]
    block = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        mask_BTS = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop))[None]
        if documents_BT is not None:
            mask_BTS &= documents_BT[:, start:stop, None] == documents_BT[:, None, :stop]
        keys, values = k_BKTH[:, :, :stop], v_BKTH[:, :, :stop]
        outs.append(masked_attention(q_BNTH[:, :, start:stop], keys, values, mask_BTS))
    return jnp.concatenate(outs, axis=2)


def windowed_attention(
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    documents_BT: jax.Array | None,
    window: int,
) -> jax.Array:
    """Attention of every position to the last `window` keys of its document, itself included.

    Work and memory grow as T·window: each block of queries meets its own block of keys and the one
    before, which together hold every key of its windows. [B, N, T, H].
    """
    B, N, T, H = q_BNTH.shape
    block = min(max(window - 1, MIN_BLOCK), T)
    blocks = -(-T // block)
    padded = blocks * block

    def split(x_BKTH: jax.Array) -> jax.Array:
        """Blocks as batch rows, [B·blocks, K, block, H]."""
        x_BKTH = jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, padded - T), (0, 0)))
        heads = x_BKTH.shape[1]
        x = x_BKTH.reshape(B, heads, blocks, block, H).swapaxes(1, 2)
        return x.reshape(B * blocks, heads, block, H)

    def with_previous(x: jax.Array, rows: int = B) -> jax.Array:
        """Each block [rows·blocks, ..., block, H] behind the one before it in its sequence."""
        x = x.reshape(rows, blocks, *x.shape[1:])
        previous = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        pairs = jnp.concatenate([previous, x], axis=-2)
        return pairs.reshape(rows * blocks, *pairs.shape[2:])

    distance = (block + jnp.arange(block))[:, None] - jnp.arange(2 * block)[None, :]
    mask = (distance >= 0) & (distance < window)
    # Document 0 is what lies before the first block.
    numbers_BT = jnp.ones((1, T), jnp.int32) if documents_BT is None else documents_BT + 1
    rows = numbers_BT.shape[0]
    numbers = jnp.pad(numbers_BT, ((0, 0), (0, padded - T))).reshape(rows * blocks, block, 1)
    mask = mask & (numbers == with_previous(numbers, rows)[:, None, :, 0])
    mask = jnp.broadcast_to(mask.reshape(rows, blocks, block, -1), (B, blocks, block, 2 * block))
    out = masked_attention(
        split(q_BNTH),
        with_previous(split(k_BKTH)),
        with_previous(split(v_BKTH)),
        mask.reshape(B * blocks, block, 2 * block),
    )
    out_BNTH = out.reshape(B, blocks, N, block, H).swapaxes(1, 2).reshape(B, N, padded, H)
    return out_BNTH[:, :, :T]
