"""One decoder layer, as a function of arrays and as a Linen module scanned over the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from plt_jax.config import ModelConfig
from plt_jax.config.model import PARTS, Part, Remat
from plt_jax.model.attention import (
    attention_parameters,
    blend,
    gate,
    project_output,
    rotated_qkv,
    sequence_attention,
)
from plt_jax.model.expert_parallel import routed_experts
from plt_jax.model.kernels import ATTENTION
from plt_jax.model.layers import (
    Parameter,
    Rotation,
    declare,
    projection,
    rms_norm,
    scale_parameter,
    swiglu,
)
from plt_jax.model.moe import RouterStatistics, mixture_of_experts, moe_parameters, weights_of_loop

Weights = Mapping[str, jax.Array]
KeysValues = tuple[jax.Array, jax.Array]
Left = TypeVar("Left")
AnyAttend = Callable[..., tuple[jax.Array, Left]]
"""`attend(...) -> (out_BNTH, left)`: decides which keys the queries see. `left` is what the caller
wants returned with the output: a cache, keys, statistics."""
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Left]]
"""`attend(q_BNTH, k_BKTH, v_BKTH, gate_BNT) -> (out_BNTH, left)`."""


Projection = Callable[
    [ModelConfig, Weights, jax.Array, Rotation], tuple[jax.Array, jax.Array, jax.Array]
]
"""Normed input [B, T, D] to queries [B, N, T, H], keys and values [B, K, T, H]; queries and keys
are rotated."""


class LayerOutputs(NamedTuple):
    """What a layer returns beside its output."""

    keys_values: KeysValues
    """This loop's own keys, rotated, and values, [B, K, T·H] each. TPUs would pad a last axis of
    H below 128 to 128, in arrays that are kept for all layers."""
    router: RouterStatistics | None
    """The router's statistics; None in dense layers."""
    gate_B: jax.Array | None
    """float32 mean of each sequence's gates over heads and positions; None without gates."""


class LayerOps(NamedTuple):
    """The products of a layer with its weights, which training and decoding lay out differently."""

    attention: Callable[
        [ModelConfig, Weights, jax.Array, jax.Array, Rotation, AnyAttend[Any]],
        tuple[jax.Array, Any],
    ]
    """A layer's input [B, T, D], and the same normed, to what `attend` returns. What `attend` is
    given, an operation decides: see `project_and_attend`."""
    output: Callable[[Weights, jax.Array], jax.Array]
    """The heads' outputs [B, N, T, H] to [B, T, D]."""
    feed_forward: Callable[
        [ModelConfig, Weights, jax.Array], tuple[jax.Array, RouterStatistics | None]
    ]
    """Normed input [B, T, D] to the feed-forward output, and the router's statistics if MoE."""


class Context(NamedTuple):
    """The positions of a batch, as every layer of every loop needs them."""

    rotation: Rotation
    documents_BT: jax.Array | None
    """int32 [B, T], the number of the document of each position; None if a row is one document."""
    loop: int | jax.Array = 0
    """Index of the current loop, 0 for the first."""


class Stack(NamedTuple):
    """Layers whose parameters have the same shapes, so that one scan runs them."""

    part: Part
    layers: int
    mixture: bool
    """Whether their feed-forward layers are mixtures of experts."""


def stacks_of(config: ModelConfig) -> dict[str, Stack]:
    """The stacks of a model in order, by their names among the parameters.

    Layers that loop are in "layers", and the others in "prelude" and "coda". The leading dense
    layers of a mixture of experts are in stacks of their own, whose names begin with "dense_".
    """
    dense, stacks = config.moe.dense_layers, {}
    for part in PARTS:
        layers = config.layers_in(part)
        name = "layers" if part == "core" else part
        leading = min(max(dense - layers.start, 0), len(layers))
        if leading:
            stacks[f"dense_{name}"] = Stack(part, leading, mixture=False)
        if leading < len(layers):
            stacks[name] = Stack(part, len(layers) - leading, bool(config.moe.experts))
    return stacks


def stacks_in(config: ModelConfig, part: Part) -> dict[str, Stack]:
    """The stacks of a part in order."""
    return {name: stack for name, stack in stacks_of(config).items() if stack.part == part}


def block_parameters(config: ModelConfig, stack: Stack) -> dict[str, Parameter]:
    """The parameters of one decoder layer of a stack."""
    config = config.of_part(stack.part)
    D, F, depth = config.width, config.ffn_width, 1 / math.sqrt(2 * config.layers)
    parameters = attention_parameters(config)
    if config.input_norms:
        parameters["ffn_norm"] = scale_parameter((D,), ("embed",))
    if stack.mixture:
        parameters |= moe_parameters(config.moe, config.loop, D, depth)
    else:
        parameters |= {
            "ffn_gate": projection((D, F), ("embed", "ffn"), D),
            "ffn_up": projection((D, F), ("embed", "ffn"), D),
            "ffn_down": projection((F, D), ("ffn", "embed"), F, depth),
        }
    for name in ("attention_output_norm", "ffn_output_norm"):
        if getattr(config, name):
            parameters[name] = scale_parameter((D,), ("embed",))
    return parameters


def project_and_attend(
    qkv: Projection,
    config: ModelConfig,
    weights: Weights,
    x_BTD: jax.Array,
    normed_BTD: jax.Array,
    rotation: Rotation,
    attend: Attend[Left],
) -> tuple[jax.Array, Left]:
    """Calls `attend` with rotated queries, keys and values, and the gates that G-SWA blends by."""
    q_BNTH, k_BKTH, v_BKTH = qkv(config, weights, normed_BTD, rotation)
    return attend(q_BNTH, k_BKTH, v_BKTH, gate(config, weights, x_BTD, q_BNTH))


def feed_forward(
    config: ModelConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics | None]:
    """SwiGLU or mixture of experts, [B, T, D] -> [B, T, D], and the router's statistics if MoE."""
    if "router" in weights:
        return mixture_of_experts(config.moe, weights, x_BTD, routed_experts)
    return swiglu(x_BTD, weights["ffn_gate"], weights["ffn_up"], weights["ffn_down"]), None


TRAINING_OPS = LayerOps(partial(project_and_attend, rotated_qkv), project_output, feed_forward)
"""Products with the parameters as the model declares them."""


def apply_block(
    config: ModelConfig,
    weights: Weights,
    x_BTD: jax.Array,
    rotation: Rotation,
    attend: AnyAttend[Left],
    ops: LayerOps = TRAINING_OPS,
) -> tuple[jax.Array, Left, RouterStatistics | None]:
    """Applies one decoder layer.

    Training, prefill and decoding differ in two things alone: how their weights are laid out, which
    `ops` knows, and which keys the queries see, which `attend` decides.

    Returns:
      The layer's output [B, T, D]; what `attend` left; and the router's statistics, None in dense
      layers.
    """

    def normed(x_BTD: jax.Array, name: str, on: bool) -> jax.Array:
        return rms_norm(x_BTD, weights[name], config.norm_epsilon) if on else x_BTD

    def scaled(x_BTD: jax.Array) -> jax.Array:
        return x_BTD if config.residual_scale == 1.0 else config.residual_scale * x_BTD

    normed_BTD = normed(x_BTD, "attention_norm", config.input_norms)
    out_BNTH, left = ops.attention(config, weights, x_BTD, normed_BTD, rotation, attend)
    out_BTD = ops.output(weights, out_BNTH)
    if config.output_bias:
        out_BTD += weights["o_bias"].astype(x_BTD.dtype)
    x_BTD += scaled(normed(out_BTD, "attention_output_norm", config.attention_output_norm))
    normed_BTD = normed(x_BTD, "ffn_norm", config.input_norms)
    out_BTD, router = ops.feed_forward(config, weights, normed_BTD)
    x_BTD += scaled(normed(out_BTD, "ffn_output_norm", config.ffn_output_norm))
    return x_BTD, left, router


class Block(nn.Module):
    """One decoder layer over whole sequences; owns the layer's parameters."""

    config: ModelConfig
    stack: Stack

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, shared: KeysValues | None = None
    ) -> tuple[jax.Array, LayerOutputs]:
        """Applies the layer.

        Args:
          shared: loop 1's keys and values of this layer, as LayerOutputs has them, for loops that
            read them; None for loops that attend to their own.

        Returns:
          The layer's output [B, T, D], and what it returns beside that.
        """
        weights = declare(self, block_parameters(self.config, self.stack))
        config, documents_BT = self.config.of_part(self.stack.part), context.documents_BT
        loop = config.loop

        def attend(q, k, v, gate_BNT):
            keys, values = (k, v) if shared is None else (x.reshape(k.shape) for x in shared)
            global_BNTH = sequence_attention(config, q, keys, values, documents_BT)
            own = k.reshape(*k.shape[:2], -1), v.reshape(*v.shape[:2], -1)
            if shared is None or loop.later_attention == "shared":
                return global_BNTH, (own, None)
            local_BNTH = sequence_attention(config, q, k, v, documents_BT, loop.window)
            # Not over the batch, which lies on several devices: a layer must not wait for them.
            gate_B = jnp.mean(gate_BNT, axis=(1, 2))
            return blend(gate_BNT, global_BNTH, local_BNTH), (own, gate_B)

        weights = weights_of_loop(weights, context.loop)
        x_BTD, (keys_values, gate_B), router = apply_block(
            config, weights, x_BTD, context.rotation, attend
        )
        x_BTD = with_logical_constraint(x_BTD, ("batch", "length", "activation"))
        return x_BTD, LayerOutputs(keys_values, router, gate_B)


def remat_policy(remat: Remat) -> Callable[..., Any]:
    """What a layer keeps of its forward pass, as a policy of `jax.checkpoint`."""
    policies = jax.checkpoint_policies
    dots = policies.dots_with_no_batch_dims_saveable
    by_name = policies.save_only_these_names(ATTENTION)

    def attention(primitive: Any, *operands: Any, **parameters: Any) -> Any:
        # cuDNN's outputs have no names of ours: JAX keeps them for its own backward pass.
        fused = primitive.name.startswith("dot_product_attention_fwd")
        return fused or by_name(primitive, *operands, **parameters)

    return {
        "full": policies.nothing_saveable,
        "attention": attention,
        "dots": dots,
        "dots_and_attention": policies.save_from_both_policies(dots, attention),
    }[remat]


def block_stack(config: ModelConfig, stack: Stack, name: str, initializing: bool) -> nn.Module:
    """All layers of a stack as one module: `stack(x, context, shared) -> (x, LayerOutputs)`.

    A scan over layers: parameters, `shared` and the LayerOutputs have a leading axis J.

    Args:
      initializing: whether the module draws its parameters, instead of reading them.
    """
    block = Block
    if config.remat != "none":
        # XLA compiles the body of a scan on its own, so nothing outside can undo the recomputation.
        # Layers that are unrolled from the scan have no such body, and need the guard.
        unrolled = config.layer_unroll > 1
        block = nn.remat(Block, policy=remat_policy(config.remat), prevent_cse=unrolled)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        # The check traces every layer twice. What a seed draws has always been drawn with it.
        check_constancy_invariants=initializing,
        in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] - flax takes trees of axes
        length=stack.layers,
        unroll=min(config.layer_unroll, stack.layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, stack, name=name)
