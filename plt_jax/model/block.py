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
    finish_qkv,
    gate,
    project_output,
    project_qkv,
    sequence_attention,
)
from plt_jax.model.expert_parallel import routed_experts
from plt_jax.model.layers import (
    Parameter,
    Rotation,
    declare,
    projection,
    rms_norm,
    scale_parameter,
    swiglu,
)
from plt_jax.model.moe import RouterStatistics, mixture_of_experts, moe_parameters, of_loops

Weights = Mapping[str, jax.Array]
KeysValues = tuple[jax.Array, jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


class LayerOutputs(NamedTuple):
    """What a layer makes besides its output."""

    keys_values: KeysValues
    """[B, K, T, H] each, the keys rotated."""
    router: RouterStatistics | None
    """None in dense layers."""
    gate_B: jax.Array | None
    """Each sequence's mean gate over heads and positions, float32; None in loops without gates."""


class Products(NamedTuple):
    """The matrix products of a layer: training and decoding lay out their weights differently."""

    qkv: Callable[[ModelConfig, Weights, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    """Normed input [B, T, D] to queries [B, N, T, H], keys and values [B, K, T, H]."""
    output: Callable[[Weights, jax.Array], jax.Array]
    """The heads' outputs [B, N, T, H] to [B, T, D]."""
    feed_forward: Callable[
        [ModelConfig, Weights, jax.Array], tuple[jax.Array, RouterStatistics | None]
    ]
    """Normed input [B, T, D] to the feed-forward output, and the router's statistics if MoE."""


class Context(NamedTuple):
    """What every layer of every loop needs to know about the positions of a batch."""

    rotation: Rotation
    documents_BT: jax.Array | None
    """int32 number of the document each position belongs to; None if each row is one document."""
    loop: int | jax.Array = 0
    """The loop that is run, 0 for the first."""


class Stack(NamedTuple):
    """Layers whose parameters have the same shapes, so that one scan runs them."""

    layers: int
    mixture: bool
    """Whether their feed-forward layers are mixtures of experts."""


def stacks_of(config: ModelConfig) -> dict[str, Stack]:
    """The stacks of a model in order, by their names among the parameters."""
    mixture, dense = bool(config.moe.experts), config.moe.dense_layers
    leading = {"dense_layers": Stack(dense, mixture=False)} if dense else {}
    return leading | {"layers": Stack(config.layers - dense, mixture)}


def block_parameters(config: ModelConfig, mixture: bool) -> dict[str, Parameter]:
    """The parameters of one decoder layer, with a mixture of experts or a dense feed-forward."""
    D, F, depth = config.width, config.ffn_width, 1 / math.sqrt(2 * config.layers)
    parameters = attention_parameters(config) | {
        "ffn_norm": scale_parameter(D, "embed"),
    }
    if mixture:
        parameters |= moe_parameters(config.moe, config.loop, D, depth)
    else:
        parameters |= {
            "ffn_gate": projection((D, F), ("embed", "ffn"), D),
            "ffn_up": projection((D, F), ("embed", "ffn"), D),
            "ffn_down": projection((F, D), ("ffn", "embed"), F, depth),
        }
    if config.ffn_output_norm:
        parameters["ffn_output_norm"] = scale_parameter(D, "embed")
    return parameters


def feed_forward(
    config: ModelConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics | None]:
    """SwiGLU or mixture of experts, [B, T, D] -> [B, T, D], and the router's statistics if MoE."""
    if "router" in weights:
        return mixture_of_experts(config.moe, weights, x_BTD, routed_experts)
    return swiglu(x_BTD, weights["ffn_gate"], weights["ffn_up"], weights["ffn_down"]), None


DECLARED_LAYOUT = Products(project_qkv, project_output, feed_forward)
"""Products with the parameters as the model declares them."""


def apply_block(
    config: ModelConfig,
    weights: Weights,
    x_BTD: jax.Array,
    rotation: Rotation,
    attend: Attend,
    products: Products = DECLARED_LAYOUT,
) -> tuple[jax.Array, RouterStatistics | None]:
    """One pre-norm decoder layer, [B, T, D] -> [B, T, D], and its router's statistics if it is MoE.

    Training, prefill and decoding differ only in how their weights lie, which `products` knows, and
    in `attend(q_BNTH, k_BKTH, v_BKTH, gate_BNT)`, which decides what the queries see and returns
    the heads' outputs [B, N, T, H].
    """
    normed_BTD = rms_norm(x_BTD, weights["attention_norm"], config.norm_epsilon)
    qkv = products.qkv(config, weights, normed_BTD)
    q_BNTH, k_BKTH, v_BKTH = finish_qkv(config, weights, qkv, rotation)
    out_BNTH = attend(q_BNTH, k_BKTH, v_BKTH, gate(config, weights, x_BTD, q_BNTH))
    x_BTD += products.output(weights, out_BNTH)
    if config.output_bias:
        x_BTD += weights["o_bias"].astype(x_BTD.dtype)
    normed_BTD = rms_norm(x_BTD, weights["ffn_norm"], config.norm_epsilon)
    out_BTD, router = products.feed_forward(config, weights, normed_BTD)
    if config.ffn_output_norm:
        out_BTD = rms_norm(out_BTD, weights["ffn_output_norm"], config.norm_epsilon)
    return x_BTD + out_BTD, router


class Block(nn.Module):
    """One decoder layer over whole sequences; owns the layer's parameters."""

    config: ModelConfig
    mixture: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, shared: KeysValues | None = None
    ) -> tuple[jax.Array, LayerOutputs]:
        """Applies the layer.

        Args:
          shared: loop 1's keys and values [B, K, T, H] of this layer, for loops that read them;
            None for loops that attend to their own.

        Returns:
          The layer's output [B, T, D], and what it made on the way.
        """
        weights = declare(self, block_parameters(self.config, self.mixture))
        loop = self.config.loop
        made: KeysValues = ()
        gate_B = None

        def attend(q, k, v, gate_BNT):
            nonlocal made, gate_B
            made = (k, v)
            keys, values = made if shared is None else shared
            everything = sequence_attention(self.config, q, keys, values, context.documents_BT)
            if shared is None or loop.later_attention == "shared":
                return everything
            local = sequence_attention(self.config, q, k, v, context.documents_BT, loop.window)
            # Not over the batch, which lies on several devices: a layer is not to wait for them.
            gate_B = jnp.mean(gate_BNT, axis=(1, 2))
            return blend(gate_BNT, everything, local)

        weights = of_loops(weights, context.loop)
        x_BTD, router = apply_block(self.config, weights, x_BTD, context.rotation, attend)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "activation"))
        return x_BTD, LayerOutputs(made, router, gate_B)


def block_stack(config: ModelConfig, stack: Stack, name: str | None = None) -> nn.Module:
    """All layers of a stack as one module: `stack(x, context, shared) -> (x, LayerOutputs)`.

    A scan over layers: parameters, `shared` and the LayerOutputs have a leading axis J.
    """
    block = Block
    if config.remat != "none":
        policies = {
            "full": jax.checkpoint_policies.nothing_saveable,
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        }
        # The body of a scan is compiled on its own, so nothing outside it can undo the
        # recomputation; but what is unrolled of a scan, or left over then, may be no body.
        unrolled = config.layer_unroll > 1
        block = nn.remat(Block, policy=policies[config.remat], prevent_cse=unrolled)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=stack.layers,
        unroll=min(config.layer_unroll, stack.layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, stack.mixture, name=name)
