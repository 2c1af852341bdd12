"""One decoder layer, as a function of arrays and as a Linen module scanned over the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.model.attention import (
    attention_parameters,
    blend,
    causal_attention,
    gate,
    project_qkv,
    windowed_attention,
)
from plt_jax.model.layers import (
    Parameter,
    Rotation,
    declare,
    projection,
    rms_norm,
    scale_parameter,
    swiglu,
)

KeysValues = tuple[jax.Array, jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


class Context(NamedTuple):
    """What every layer of every loop needs to know about the positions of a batch."""

    rotation: Rotation
    documents_BT: jax.Array | None
    """int32 number of the document each position belongs to; None if each row is one document."""


def block_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The parameters of one decoder layer."""
    D, F = config.width, config.ffn_width
    parameters = attention_parameters(config) | {
        "ffn_norm": scale_parameter(D, "embed"),
        "ffn_gate": projection((D, F), ("embed", "ffn"), D),
        "ffn_up": projection((D, F), ("embed", "ffn"), D),
        "ffn_down": projection((F, D), ("ffn", "embed"), F, 1 / math.sqrt(2 * config.layers)),
    }
    if config.ffn_output_norm:
        parameters["ffn_output_norm"] = scale_parameter(D, "embed")
    return parameters


def apply_block(
    config: ModelConfig,
    weights: Mapping[str, jax.Array],
    x_BTD: jax.Array,
    rotation: Rotation,
    attend: Attend,
) -> jax.Array:
    """One pre-norm decoder layer, [B, T, D] -> [B, T, D].

    Training, prefill and decoding differ only in `attend(q_BNTH, k_BKTH, v_BKTH, gate_BNT)`, which
    decides what the queries see and returns the heads' outputs [B, N, T, H].
    """
    normed_BTD = rms_norm(x_BTD, weights["attention_norm"], config.norm_epsilon)
    q_BNTH, k_BKTH, v_BKTH = project_qkv(config, weights, normed_BTD, rotation)
    out_BNTH = attend(q_BNTH, k_BKTH, v_BKTH, gate(config, weights, x_BTD, q_BNTH))
    x_BTD += jnp.einsum("BNTH,NHD->BTD", out_BNTH, weights["o"].astype(x_BTD.dtype))
    return x_BTD + feed_forward(config, weights, x_BTD)


def feed_forward(
    config: ModelConfig, weights: Mapping[str, jax.Array], x_BTD: jax.Array
) -> jax.Array:
    """The feed-forward half of a layer, its norms included and the residual sum not."""
    normed_BTD = rms_norm(x_BTD, weights["ffn_norm"], config.norm_epsilon)
    out_BTD = swiglu(normed_BTD, weights["ffn_gate"], weights["ffn_up"], weights["ffn_down"])
    if config.ffn_output_norm:
        out_BTD = rms_norm(out_BTD, weights["ffn_output_norm"], config.norm_epsilon)
    return out_BTD


class Block(nn.Module):
    """One decoder layer over whole sequences; owns the layer's parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, shared: KeysValues | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """Applies the layer.

        Args:
          shared: loop 1's keys and values [B, K, T, H] of this layer, for loops that read them;
            None for loops that attend to their own.

        Returns:
          The layer's output [B, T, D], and the keys and values that it made.
        """
        weights = declare(self, block_parameters(self.config))
        loop = self.config.loop
        made: KeysValues = ()

        def attend(q, k, v, gate_BNT):
            nonlocal made
            made = (k, v)
            keys, values = made if shared is None else shared
            everything = causal_attention(q, keys, values, context.documents_BT)
            if shared is None or loop.later_attention == "shared":
                return everything
            local = windowed_attention(q, k, v, context.documents_BT, loop.window)
            return blend(gate_BNT, everything, local)

        x_BTD = apply_block(self.config, weights, x_BTD, context.rotation, attend)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "activation"))
        return x_BTD, made


def block_stack(config: ModelConfig, name: str | None = None) -> nn.Module:
    """All layers as one module: `stack(x, context, shared) -> (x, keys and values by layer)`.

    A scan over layers: parameters, `shared` and the keys and values returned have a leading axis J.
    """
    block = Block
    if config.remat != "none":
        policies = {
            "full": jax.checkpoint_policies.nothing_saveable,
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        }
        # A scan body is compiled on its own, so nothing outside it can undo the recomputation.
        block = nn.remat(Block, policy=policies[config.remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=config.layers,
        unroll=min(config.layer_unroll, config.layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, name=name)
