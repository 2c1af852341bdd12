"""The Parallel Loop Transformer: tokens to logits."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from plt_jax.config import ModelConfig
from plt_jax.config.model import Part
from plt_jax.distributed.axes import devices_along, sharded_axes
from plt_jax.errors import InputError
from plt_jax.model.block import (
    Context,
    KeysValues,
    LayerOutputs,
    block_parameters,
    block_stack,
    stacks_in,
    stacks_of,
)
from plt_jax.model.layers import (
    Parameter,
    constant_parameter,
    declare,
    embed,
    head_weight,
    logits_from,
    projection,
    rms_norm,
    rope_rotation,
    scale_parameter,
    zero_parameter,
)
from plt_jax.model.looping import LoopStates, exit_probabilities, run_loops
from plt_jax.model.loss import HeadLoss, head_loss
from plt_jax.model.moe import float32_product


def top_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The parameters outside the layers."""
    V, D = config.vocab_size, config.width
    # Embeddings start as large as the normed outputs that later loops add to them, and as the sum
    # of the first layers' outputs, so that the model distinguishes tokens from the start. Tied
    # embeddings are the head too, whose logits must start small.
    embedding_std = 1 / math.sqrt(D) if config.tied_embeddings else 1.0
    parameters = {
        "embedding": Parameter((V, D), ("vocab", "embed"), nn.initializers.normal(embedding_std)),
        "final_norm": scale_parameter((D,), ("embed",)),
    }
    if not config.tied_embeddings:
        parameters["head"] = projection((D, V), ("embed", "vocab"), D)
    loop = config.loop
    if config.has_coda and (loop.normalize_between_loops or loop.exit_gate):
        # The final norm belongs to the coda's output.
        parameters["loop_norm"] = scale_parameter((D,), ("embed",))
    if loop.learned_hidden_scale:
        scale = constant_parameter((D,), ("embed",), loop.hidden_scale)
        parameters["hidden_scale"] = scale
    if loop.exit_gate:
        parameters["exit_gate"] = zero_parameter((D, 1), ("embed", None))
        parameters["exit_gate_bias"] = zero_parameter((1,), (None,))
    return parameters


def loop_norm(config: ModelConfig) -> str:
    """The name of the norm between loops among the parameters."""
    return "loop_norm" if config.has_coda else "final_norm"


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the model's parameters, boxed with their logical axis names.

    They come from the declarations, since tracing `init` takes half a second.
    """

    def boxed(parameter: Parameter) -> nn.LogicallyPartitioned:
        leaf = jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
        return nn.LogicallyPartitioned(leaf, parameter.axes)

    def stacked(parameter: Parameter, layers: int) -> Parameter:
        shape, axes = (layers, *parameter.shape), ("layers", *parameter.axes)
        return parameter._replace(shape=shape, axes=axes)

    top = {name: boxed(parameter) for name, parameter in top_parameters(config).items()}
    return top | {
        name: {
            parameter: boxed(stacked(declared, stack.layers))
            for parameter, declared in block_parameters(config, stack).items()
        }
        for name, stack in stacks_of(config).items()
    }


def number_documents(segment_ids_BT: jax.Array) -> jax.Array:
    """Numbers the documents of each row 0, 1, ..., int32 [B, T]: runs of equal segment ids."""
    starts = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def positions_in_documents(documents_BT: jax.Array) -> jax.Array:
    """Position of each token in its document, int32 [B, T], from the document numbers."""
    index = jnp.arange(documents_BT.shape[1], dtype=jnp.int32)
    starts = jnp.pad(documents_BT[:, 1:] != documents_BT[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def check_length(length: int) -> None:
    """Raises InputError for a length that does not divide over the devices of the current mesh."""
    axes = sharded_axes("length")
    if axes and length % devices_along(axes):
        raise InputError(
            f"sequences of {length} do not divide by the {devices_along(axes)} devices of mesh "
            f"axis {' x '.join(axes)}; change either"
        )


class Transformer(nn.Module):
    """A decoder-only transformer whose layer stack runs L times, by any scheme of the config.

    `init(key, tokens)["params"]` is `{"embedding": [V, D], "final_norm": [D], "head": [D, V] unless
    tied, "layers": {name: [J, ...]}}`, float32, each leaf boxed with its logical axis names
    (`flax.linen.unbox` takes them off). `stacks_of` says where layers are that do not loop, and
    the leading dense layers of a mixture of experts.
    """

    config: ModelConfig

    def setup(self):
        self.top = declare(self, top_parameters(self.config))
        self.stacks = {
            name: block_stack(self.config, stack, name, self.is_initializing())
            for name, stack in stacks_of(self.config).items()
        }

    def layers(
        self,
        part: Part,
        x_BTD: jax.Array,
        context: Context,
        shared: dict[str, KeysValues] | None = None,
    ) -> tuple[jax.Array, dict[str, LayerOutputs]]:
        """All layers of a part once, stack by stack; see `block_stack`."""
        outputs = {}
        for name in stacks_in(self.config, part):
            x_BTD, outputs[name] = self.stacks[name](x_BTD, context, shared and shared[name])
        return x_BTD, outputs

    def normalize(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm."""
        return rms_norm(x_BTD, self.top["final_norm"], self.config.norm_epsilon)

    def normalize_loop(self, x_BTD: jax.Array) -> jax.Array:
        """The norm between loops: the final norm, unless layers follow the loops."""
        scale = self.top[loop_norm(self.config)]
        return rms_norm(x_BTD, scale, self.config.norm_epsilon)

    def hidden_scale(self) -> float | jax.Array:
        """The scale b of the previous loop's output, or its scales by channel, [D]."""
        return self.top.get("hidden_scale", self.config.loop.hidden_scale)

    def loop_states(
        self,
        tokens_BT: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        hidden_share: float | jax.Array = 1.0,
    ) -> LoopStates:
        """The states of every loop [L, B, T, D]; arguments as in `__call__`.

        Args:
          hidden_share: factor of the scale of the previous loop's output.
        """
        context = self.context(tokens_BT, segment_ids, positions)
        return run_loops(self, self.config, self.embed(tokens_BT), context, hidden_share)

    def context(
        self,
        tokens_BT: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> Context:
        """The positions of a batch; arguments as in `__call__`."""
        check_length(tokens_BT.shape[1])
        documents_BT = None if segment_ids is None else number_documents(segment_ids)
        if positions is None and documents_BT is not None:
            positions = positions_in_documents(documents_BT)
        elif positions is None:
            positions = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        return Context(rope_rotation(self.config, positions), documents_BT)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The embeddings [B, T, D], in the compute dtype."""
        embeddings_BTD = embed(tokens_BT, self.top["embedding"], jnp.dtype(self.config.dtype))
        return with_logical_constraint(embeddings_BTD, ("batch", "length", "activation"))

    def readout(self, hidden_BTD: jax.Array, context: Context) -> jax.Array:
        """What the head reads if a loop with these hidden states is the last, [B, T, D]: the coda's
        output, normed."""
        return self.normalize(self.layers("coda", hidden_BTD, context)[0])

    def readouts(self, states: LoopStates, context: Context) -> jax.Array:
        """What the head reads if each loop is the last, [L, B, T, D].

        Args:
          context: that of the states' tokens.
        """
        if not self.config.has_coda:
            return self.normalize(states.hidden_LBTD)
        return jnp.stack([self.readout(hidden_BTD, context) for hidden_BTD in states.hidden_LBTD])

    def exit_probabilities(self, hidden_LBTD: jax.Array) -> jax.Array:
        """The probability that each position exits after each loop, by the exit gate, float32
        [L, B, T]; see `looping.exit_probabilities`.

        Args:
          hidden_LBTD: the hidden states of all loops; see `LoopStates`.
        """
        score_LBT1 = float32_product(self.normalize_loop(hidden_LBTD), self.top["exit_gate"])
        return exit_probabilities(jax.nn.sigmoid(score_LBT1 + self.top["exit_gate_bias"])[..., 0])

    def logits(self, normed_BTD: jax.Array) -> jax.Array:
        """Normed states [B, T, D] to float32 logits [B, T, V]."""
        logits_BTV = logits_from(normed_BTD, self.top["embedding"], self.top.get("head"))
        return with_logical_constraint(logits_BTV, ("batch", "length", "vocab"))

    def loss(
        self,
        normed_BTD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        z_loss: float = 0.0,
    ) -> HeadLoss:
        """The cross-entropy of `logits(normed_BTD)`, which are not kept; see `head_loss`."""
        head_DV = head_weight(self.top["embedding"], self.top.get("head"))
        return head_loss(normed_BTD, head_DV, targets_BT, weights_BT, z_loss)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The last loop's logits, float32 [B, T, V]; position i predicts token i + 1.

        Args:
          tokens: int32 [B, T].
          segment_ids: int32 [B, T]; runs of equal ids are documents, and nothing crosses their
            borders. Without it each row is one document.
          positions: int32 [B, T] for RoPE alone; by default counted within each document.
        """
        states = self.loop_states(tokens, segment_ids, positions)
        return self.logits(states.output_LBTD[-1])

    def declare_one(self, name: str) -> None:
        """Declares the parameters outside the layers and, if it has this name, one stack, which
        runs over one token.

        `init(key, name, method="declare_one")["params"][name]` is that of `init(key, tokens)`, in a
        fraction of its time and memory.
        """
        if name in self.stacks:
            rotation = rope_rotation(self.config, jnp.zeros((1, 1), jnp.int32))
            x_BTD = jnp.zeros((1, 1, self.config.width), jnp.dtype(self.config.dtype))
            self.stacks[name](x_BTD, Context(rotation, None), None)

    def logits_by_loop(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The logits if each loop is the last, float32 [L, B, T, V]."""
        states = self.loop_states(tokens, segment_ids, positions)
        context = self.context(tokens, segment_ids, positions)
        return jax.vmap(self.logits)(self.readouts(states, context))
