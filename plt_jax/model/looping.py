"""The looping schemes (Table 2 of the PLT paper): one stack of layers applied L times.

Loop 1 reads the embeddings. Each later loop reads what the previous loop handed on: at the same
position (vanilla looping), or, with cross-loop parallelism (CLP), shifted right by one position and
added to the embeddings again. Every loop is parallel over positions; loops run one after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from plt_jax.config import LoopConfig, ModelConfig
from plt_jax.errors import InputError
from plt_jax.model.block import Context, KeysValues, LayerOutputs
from plt_jax.model.context_parallel import shift_right
from plt_jax.model.moe import RouterStatistics


class LoopStates(NamedTuple):
    """The states of all loops, in the compute dtype."""

    raw_LBTD: jax.Array
    """The last layer's output of each loop."""
    handed_LBTD: jax.Array
    """What each loop hands on: the final norm of it, or, between loops that are not normalised, the
    raw output."""
    router: RouterStatistics | None
    """The routers' statistics [L, J, ...], of the J layers with experts; None in dense models."""
    rms_LBT: jax.Array
    """The root mean square of each position's raw output, float32."""
    gate_LJB: jax.Array | None
    """Mean gates of the loops behind the first, [L-1, J, B], over heads and positions, for all J
    layers; None in schemes without gates, and where there is one loop."""


class LoopedModel(Protocol):
    """What the loops ask of the module that owns the parameters."""

    def layers(
        self, x_BTD: jax.Array, context: Context, shared: dict[str, KeysValues] | None
    ) -> tuple[jax.Array, dict[str, LayerOutputs]]: ...

    def normalize(self, x_BTD: jax.Array) -> jax.Array: ...


def hand_to_next(states_BTD: jax.Array, documents_BT: jax.Array | None) -> jax.Array:
    """Moves states one position to the right; zero at the first position of every document."""
    shifted_BTD = shift_right(states_BTD)
    if documents_BT is None:
        return shifted_BTD
    # The first position of all has no state to be kept from.
    same_document = documents_BT == shift_right(documents_BT)
    return jnp.where(same_document[:, :, None], shifted_BTD, 0)


def loop_input(loop: LoopConfig, embeddings_BTD: jax.Array, previous_BTD: jax.Array) -> jax.Array:
    """What a loop > 1 reads: `previous` as it is, or a·E + b·previous in the shifted schemes."""
    if not loop.shifted:
        return previous_BTD
    mixed = loop.embedding_scale * embeddings_BTD + loop.hidden_scale * previous_BTD
    return mixed.astype(embeddings_BTD.dtype)


def with_loops(config: ModelConfig, params: Any, count: int) -> tuple[ModelConfig, Any]:
    """A model that runs `count` loops, more or fewer than it was trained with, by its parameters.

    All loops share their weights; of what each has of its own, the biases of routers, further loops
    have those of the last.

    Raises:
      InputError: the scheme runs one loop only, or count is below 1.
    """
    if count < 1 or (config.loop.scheme == "no_loop" and count != 1):
        raise InputError(
            f"{config.loop.scheme} cannot run {count} loops; give "
            + ("1" if config.loop.scheme == "no_loop" else "1 or more")
        )
    loop = config.loop.model_copy(update={"count": count})
    layers = params["layers"]
    if "router_bias" in layers:
        own = jnp.minimum(jnp.arange(count), config.loop.count - 1)
        layers = layers | {"router_bias": layers["router_bias"][:, own]}
    return config.model_copy(update={"loop": loop}), params | {"layers": layers}


def run_loops(
    model: nn.Module | LoopedModel, loop: LoopConfig, embeddings_BTD: jax.Array, context: Context
) -> LoopStates:
    """Runs all loops over whole sequences; embeddings [B, T, D].

    Loops 2..L are one scan that holds the model's parameters fixed, so that the program's size does
    not grow with L.
    """
    raw_BTD, outputs = model.layers(embeddings_BTD, context, None)
    shared = None
    if loop.later_attention != "own":
        shared = {name: made.keys_values for name, made in outputs.items()}

    def hand_on(model, raw_BTD):
        return model.normalize(raw_BTD) if loop.normalize_between_loops else raw_BTD

    def states_of(model, raw_BTD, outputs):
        rms_BT = jnp.sqrt(jnp.mean(jnp.square(raw_BTD.astype(jnp.float32)), axis=-1))
        gates = [made.gate_B for made in outputs.values() if made.gate_B is not None]
        gate_JB = jnp.concatenate(gates) if gates else None
        router = outputs["layers"].router
        return LoopStates(raw_BTD, hand_on(model, raw_BTD), router, rms_BT, gate_JB)

    def later_loop(model, previous_BTD, index):
        if loop.shifted:
            previous_BTD = hand_to_next(previous_BTD, context.documents_BT)
        x_BTD = loop_input(loop, embeddings_BTD, previous_BTD)
        raw_BTD, outputs = model.layers(x_BTD, context._replace(loop=index), shared)
        states = states_of(model, raw_BTD, outputs)
        return states.handed_LBTD, states

    first = states_of(model, raw_BTD, outputs)
    states = jax.tree.map(lambda x: x[None], first)
    if loop.count > 1:
        later_loops = nn.scan(
            later_loop,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=loop.count - 1,
        )
        _, later = later_loops(model, first.handed_LBTD, jnp.arange(1, loop.count))
        gate_LJB, later = later.gate_LJB, later._replace(gate_LJB=None)
        states = jax.tree.map(lambda one, more: jnp.concatenate([one, more]), states, later)
        states = states._replace(gate_LJB=gate_LJB)
    if not loop.normalize_between_loops:  # the last loop's output is normalised all the same
        last_BTD = model.normalize(states.raw_LBTD[-1])
        states = states._replace(handed_LBTD=states.handed_LBTD.at[-1].set(last_BTD))
    return states
