"""The looping schemes (Table 2 of the PLT paper): one stack of layers applied L times.

Loop 1 reads the embeddings. Each later loop reads the output of the previous loop: at the same
position (vanilla looping), or, with cross-loop parallelism (CLP), shifted right by one position and
added to the embeddings again. `loop_output` and `next_loop_input` are this recurrence. Training,
prefill, the decode step and the loop diagnostics all use them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from plt_jax.config import LoopConfig, ModelConfig
from plt_jax.errors import InputError
from plt_jax.model.block import Context, KeysValues, LayerOutputs
from plt_jax.model.context_parallel import shift_right
from plt_jax.model.moe import RouterStatistics

Norm = Callable[[jax.Array], jax.Array]
"""The final norm, [..., D] -> [..., D]."""


class LoopStates(NamedTuple):
    """The states of all loops, in the compute dtype."""

    hidden_LBTD: jax.Array
    """The last layer's output of each loop, before any norm."""
    output_LBTD: jax.Array
    """The output of each loop; see `loop_output`. The head reads the last loop's."""
    router: RouterStatistics | None
    """The routers' statistics [L, J, ...], over the J layers with experts; None in dense models."""
    rms_LBT: jax.Array
    """The root mean square of each position's hidden state, float32."""
    gate_LJB: jax.Array | None
    """Mean gates of loops 2..L, float32 [L-1, J, B], over heads and positions, for all J layers;
    None in schemes without gates, and in models with one loop."""


class LoopedModel(Protocol):
    """What `run_loops` needs of the module that owns the parameters."""

    def layers(
        self, x_BTD: jax.Array, context: Context, shared: dict[str, KeysValues] | None
    ) -> tuple[jax.Array, dict[str, LayerOutputs]]: ...

    def normalize(self, x_BTD: jax.Array) -> jax.Array: ...


def shift_states(states_BTD: jax.Array, documents_BT: jax.Array | None) -> jax.Array:
    """Moves states [B, T, D] one position to the right; documents begin with zero."""
    shifted_BTD = shift_right(states_BTD)
    if documents_BT is None:
        return shifted_BTD
    # Position 0 needs no mask: it gets the zero that `shift_right` puts there.
    same_document = documents_BT == shift_right(documents_BT)
    return jnp.where(same_document[:, :, None], shifted_BTD, 0)


def loop_output(
    loop: LoopConfig,
    hidden: jax.Array,
    normalize: Norm,
    is_last: bool | jax.Array,
) -> jax.Array:
    """The output of a loop, [..., D]: its hidden state, through the final norm or as it is.

    The last loop's output is always normalised, since the head reads it. The outputs of the others
    are normalised if `normalize_between_loops` says so.

    Args:
      hidden: the last layer's output [..., D].
      is_last: whether this is the last loop; an array, broadcast to `hidden`, where that differs
        between rows or is known on the device alone.
    """
    if loop.normalize_between_loops or is_last is True:
        return normalize(hidden)
    if is_last is False:
        return hidden
    return jnp.where(is_last, normalize(hidden), hidden)


def output_after(loops_B: jax.Array, hidden_BLD: jax.Array, normalize: Norm) -> jax.Array:
    """What the head reads of each sequence if it runs a number of loops of its own, [B, 1, D].

    A loop reads nothing of later ones, so all sequences can run all loops.

    Args:
      loops_B: int32, the numbers of loops, 1 to L.
      hidden_BLD: the last layer's output at one position, of every loop.
    """
    return normalize(jnp.take_along_axis(hidden_BLD, (loops_B - 1)[:, None, None], axis=1))


def next_loop_input(
    loop: LoopConfig,
    embeddings: jax.Array,
    output: jax.Array,
    shift: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The input of a loop > 1, [..., D]: `output` as it is, or a·E + b·shift(output) with CLP.

    Args:
      output: the previous loop's output [..., D].
      shift: moves each position's output to the next position.
    """
    if not loop.shifted:
        return output
    mixed = loop.embedding_scale * embeddings + loop.hidden_scale * shift(output)
    return mixed.astype(embeddings.dtype)


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

    With more than two loops, loops 2..L are one scan that holds the model's parameters fixed, so
    that the program's size does not grow with L.
    """
    shift = partial(shift_states, documents_BT=context.documents_BT)
    last = loop.count - 1

    def states_of(model, hidden_BTD, outputs, is_last):
        output_BTD = loop_output(loop, hidden_BTD, model.normalize, is_last)
        rms_BT = jnp.sqrt(jnp.mean(jnp.square(hidden_BTD.astype(jnp.float32)), axis=-1))
        gates = [layers.gate_B for layers in outputs.values() if layers.gate_B is not None]
        gate_JB = jnp.concatenate(gates) if gates else None
        return LoopStates(hidden_BTD, output_BTD, outputs["layers"].router, rms_BT, gate_JB)

    hidden_BTD, outputs = model.layers(embeddings_BTD, context, None)
    first = states_of(model, hidden_BTD, outputs, is_last=last == 0)
    states = jax.tree.map(lambda x: x[None], first)
    if loop.count == 1:
        return states
    shared = None
    if loop.later_attention != "own":
        shared = {name: layers.keys_values for name, layers in outputs.items()}

    def later_loop(model, output_BTD, index):
        x_BTD = next_loop_input(loop, embeddings_BTD, output_BTD, shift)
        hidden_BTD, outputs = model.layers(x_BTD, context._replace(loop=index), shared)
        states = states_of(model, hidden_BTD, outputs, is_last=index == last)
        return states.output_LBTD, states

    if last == 1:
        # A scan of one turn would still stack what the backward pass needs: XLA leaves the copies.
        _, second = later_loop(model, first.output_LBTD, 1)
        later = jax.tree.map(lambda x: x[None], second)
    else:
        later_loops = nn.scan(
            later_loop, variable_broadcast="params", split_rngs={"params": False}, length=last
        )
        _, later = later_loops(model, first.output_LBTD, jnp.arange(1, loop.count))
    gate_LJB, later = later.gate_LJB, later._replace(gate_LJB=None)
    states = jax.tree.map(lambda one, more: jnp.concatenate([one, more]), states, later)
    return states._replace(gate_LJB=gate_LJB)
