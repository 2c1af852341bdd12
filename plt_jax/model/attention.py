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
from plt_jax.distributed.axes import sharded_axes
from plt_jax.errors import InputError
from plt_jax.model.blockwise import causal_attention, windowed_attention
from plt_jax.model.context_parallel import spread_attention
from plt_jax.model.kernels import (
    Backend,
    available_backend,
    cudnn_attention,
    splash_attention,
)
from plt_jax.model.layers import (
    Parameter,
    Rotation,
    constant_parameter,
    multiplies_rows,
    projection,
    rms_norm,
    rotate,
    scale_parameter,
    times_weight,
    zero_parameter,
)


def attention_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The attention parameters of one layer."""
    D, N, K, H = config.width, config.heads, config.kv_heads, config.head_width
    parameters = {"attention_norm": scale_parameter((D,), ("embed",))} if config.input_norms else {}
    parameters |= {
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
    if config.qk_norm and config.qk_norm_over == "head":
        parameters["q_norm"] = scale_parameter((H,), ("head",))
        parameters["k_norm"] = scale_parameter((H,), ("head",))
    elif config.qk_norm:
        parameters["q_norm"] = scale_parameter((N, H), ("heads", "head"))
        parameters["k_norm"] = scale_parameter((K, H), ("kv_heads", "head"))
    if config.loop.later_attention == "gated":
        parameters |= gate_parameters(config)
    return parameters


def gate_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The G-SWA gate of one layer, shared by all loops > 1; by default it starts at 1/2."""
    D, N, H = config.width, config.heads, config.head_width
    bias = {"gate_bias": constant_parameter((N,), ("heads",), config.loop.gate_bias)}
    if config.loop.gate_input == "query":
        return bias | {"gate_weight": zero_parameter((N, H), ("heads", "head"))}
    return bias | {
        "gate_norm": scale_parameter((D,), ("embed",)),
        "gate_weight": zero_parameter((D, N), ("embed", "heads")),
    }


def rotated_qkv(
    config: ModelConfig, weights: Mapping[str, jax.Array], x_BTD: jax.Array, rotation: Rotation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, N, T, H], keys and values [B, K, T, H]: projected, with biases, and queries and
    keys normed and rotated."""
    q_BNTH, k_BKTH, v_BKTH = (to_heads(x_BTD, weights[name]) for name in "qkv")
    if config.qkv_bias:
        q_BNTH, k_BKTH, v_BKTH = (
            x_BNTH + weights[name][:, None].astype(x_BNTH.dtype)
            for x_BNTH, name in ((q_BNTH, "q_bias"), (k_BKTH, "k_bias"), (v_BKTH, "v_bias"))
        )
    if config.qk_norm:
        q_BNTH, k_BKTH = (
            norm_heads(config, x_BNTH, weights[name])
            for x_BNTH, name in ((q_BNTH, "q_norm"), (k_BKTH, "k_norm"))
        )
    return rotate(q_BNTH, rotation), rotate(k_BKTH, rotation), v_BKTH


def norm_heads(config: ModelConfig, x_BNTH: jax.Array, scale: jax.Array) -> jax.Array:
    """The RMSNorm of queries or keys: of each head, or of all heads of a position together.

    Args:
      scale: [H], or [N, H] over all heads.
    """
    if config.qk_norm_over == "head":
        return rms_norm(x_BNTH, scale, config.norm_epsilon)
    B, N, T, H = x_BNTH.shape
    x_BTD = x_BNTH.swapaxes(1, 2).reshape(B, T, N * H)
    normed_BTD = rms_norm(x_BTD, scale.reshape(-1), config.norm_epsilon)
    return normed_BTD.reshape(B, T, N, H).swapaxes(1, 2)


def to_heads(x_BTD: jax.Array, weight_DNH: jax.Array) -> jax.Array:
    """A projection to heads, [B, T, D] x [D, N, H] -> [B, N, T, H]."""
    D, N, H = weight_DNH.shape
    if not multiplies_rows():
        return jnp.einsum("BTD,DNH->BNTH", x_BTD, weight_DNH.astype(x_BTD.dtype))
    x_BTNH = times_weight(x_BTD, weight_DNH.reshape(D, N * H)).reshape(*x_BTD.shape[:2], N, H)
    return x_BTNH.swapaxes(1, 2)


def project_output(weights: Mapping[str, jax.Array], out_BNTH: jax.Array) -> jax.Array:
    """The output projection: the heads' outputs [B, N, T, H] to [B, T, D]."""
    weight_NHD = weights["o"].astype(out_BNTH.dtype)
    if not multiplies_rows():
        return jnp.einsum("BNTH,NHD->BTD", out_BNTH, weight_NHD)
    B, N, T, H = out_BNTH.shape
    out_BTD = out_BNTH.swapaxes(1, 2).reshape(B, T, N * H)
    return times_weight(out_BTD, weight_NHD.reshape(N * H, -1))


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


def fastest_backend() -> Backend:
    """The fastest attention on the program's devices and mesh, for models that it supports."""
    available = available_backend()
    # cuDNN knows no offset between queries and keys.
    return "xla" if available == "cudnn" and sharded_axes("length") else available


def choose_backend(config: ModelConfig) -> Backend:
    """The attention for whole sequences: `config.attention`, or for "auto" the fastest.

    Raises:
      InputError: the devices that the program is traced for cannot run the configured attention.
    """
    available = fastest_backend()
    if config.attention == "auto":
        refused = available == "cudnn" and config.cudnn_obstacle is not None
        return "xla" if refused else available
    if config.attention not in ("xla", available):
        needed = {
            "cudnn": "an NVIDIA GPU of compute capability 8.0 or above and mesh.context = 1",
            "splash": "a TPU",
        }
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
      documents_BT: int32 document numbers; no position sees another document. None if each row is
        one document.
      window: number of keys that a position sees, its own included; None for all earlier ones.

    Raises:
      InputError: see `choose_backend`.
    """
    backend = choose_backend(config)
    if window is not None:
        window = min(window, q_BNTH.shape[2])  # padded to it where devices share a sequence
    if sharded_axes("length"):
        return spread_attention(backend, q_BNTH, k_BKTH, v_BKTH, documents_BT, window)
    if backend == "splash":
        return splash_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, window)
    # cuDNN takes documents only as a [T, T] bias, with which it has no windows before 9.10.2. The
    # blocks below take both, in memory that does not grow as T·T.
    if backend == "cudnn" and (window is None or documents_BT is None):
        return cudnn_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, window)
    if window is None:
        return causal_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT)
    return windowed_attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, window)
