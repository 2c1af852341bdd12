"""The looping schemes (Table 2 of the PLT paper): one stack of layers applied L times.

Loop 1 reads the embeddings. Each later loop reads the output of the previous loop: at the same
position (vanilla looping), or, with cross-loop parallelism (CLP), shifted right by one position and
added to the embeddings again. `loop_output` and `next_loop_input` are this recurrence. Training,
prefill, the decode step and the loop diagnostics all use them.

Where only a part of the layers loops (the core), the output of the layers before it (the prelude)
takes the place of the embeddings, and the layers behind it (the coda) read the last loop's output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from plt_jax.config import LoopConfig, ModelConfig
from plt_jax.config.model import Part
from plt_jax.errors import InputError
from plt_jax.model.block import Context, KeysValues, LayerOutputs, stacks_in
from plt_jax.model.context_parallel import shift_right
from plt_jax.model.moe import RouterStatistics

Norm = Callable[[jax.Array], jax.Array]
"""A norm between loops, [..., D] -> [..., D]."""


class LoopStates(NamedTuple):
    """The states of all loops, in the compute dtype."""

    hidden_LBTD: jax.Array
    """The output of the last layer of each loop, before any norm."""
    output_LBTD: jax.Array
    """What reads each loop's output: of the last loop the head, behind the coda and the final norm,
    and of the others the next loop; see `loop_output`."""
    router: RouterStatistics | None
    """The statistics of the looped layers' routers [L, J, ...], over the J layers with experts;
    None if there are none."""
    outer_router: RouterStatistics | None
    """Those of the prelude's and the coda's routers [1, J, ...]; None if there are none."""
    rms_LBT: jax.Array
    """The root mean square of each position's hidden state, float32."""
    gate_LJB: jax.Array | None
    """Mean gates of loops 2..L, float32 [L-1, J, B], over heads and positions, for all J looped
    layers; None in schemes without gates, and in models with one loop."""


class LoopedModel(Protocol):
    """What `run_loops` needs of the module that owns the parameters."""

    def layers(
        self,
        part: Part,
        x_BTD: jax.Array,
        context: Context,
        shared: dict[str, KeysValues] | None = None,
    ) -> tuple[jax.Array, dict[str, LayerOutputs]]: ...

    def normalize(self, x_BTD: jax.Array) -> jax.Array: ...

    def normalize_loop(self, x_BTD: jax.Array) -> jax.Array: ...

    def hidden_scale(self) -> float | jax.Array: ...


def shift_states(states_BTD: jax.Array, documents_BT: jax.Array | None) -> jax.Array:
    """Moves states [B, T, D] one position to the right; documents begin with zero."""
    shifted_BTD = shift_right(states_BTD)
    if documents_BT is None:
        return shifted_BTD
    # Position 0 needs no mask: it gets the zero that `shift_right` puts there.
    same_document = documents_BT == shift_right(documents_BT)
    return jnp.where(same_document[:, :, None], shifted_BTD, 0)


def loop_output(loop: LoopConfig, hidden: jax.Array, normalize: Norm) -> jax.Array:
    """What the next loop reads of a loop, [..., D]: its hidden state, normed or as it is.

    Args:
      hidden: the output of the loop's last layer [..., D].
    """
    return normalize(hidden) if loop.normalize_between_loops else hidden


def rows_of_loops(loops_B: jax.Array, rows_BLD: jax.Array) -> jax.Array:
    """The row of the last loop of each sequence, [B, 1, D].

    A loop reads nothing of later ones, so all sequences can run all loops.

    Args:
      loops_B: int32, the number of loops of each sequence, 1 to L.
      rows_BLD: states at one position, of every loop.
    """
    return jnp.take_along_axis(rows_BLD, (loops_B - 1)[:, None, None], axis=1)


def next_loop_input(
    loop: LoopConfig,
    embeddings: jax.Array,
    output: jax.Array,
    shift: Callable[[jax.Array], jax.Array],
    hidden_scale: float | jax.Array,
) -> jax.Array:
    """The input of a loop > 1, [..., D]: `output` as it is, or a·E + b·shift(output) with CLP.

    Args:
      embeddings: what loop 1 reads: the embeddings, or the prelude's output.
      output: the previous loop's output [..., D].
      shift: moves each position's output to the next position.
      hidden_scale: b, or its values by channel [D].
    """
    if not loop.shifted:
        return output
    mixed = loop.embedding_scale * embeddings + hidden_scale * shift(output)
    return mixed.astype(embeddings.dtype)


def exit_probabilities(leaves_L: jax.Array) -> jax.Array:
    """The probability that a token exits after each loop, [L, ...]; they sum to 1 (Ouro, arXiv
    2510.25741).

    Args:
      leaves_L: [L, ...], the probability to exit after a loop once it is reached. The last loop's
        is not used, since it ends in any case.
    """
    stays_L = jnp.cumprod(1.0 - leaves_L[:-1], axis=0)
    reached_L = jnp.concatenate([jnp.ones_like(leaves_L[:1]), stays_L])
    return reached_L * leaves_L.at[-1].set(1.0)


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
    longer = config.model_copy(update={"loop": loop})
    stacks = {}
    for name in stacks_in(config, "core"):
        layers = params[name]
        if "router_bias" in layers:
            own = jnp.minimum(jnp.arange(count), config.loop.count - 1)
            layers = layers | {"router_bias": layers["router_bias"][:, own]}
        stacks[name] = layers
    return longer, params | stacks


def run_loops(
    model: nn.Module | LoopedModel,
    config: ModelConfig,
    embeddings_BTD: jax.Array,
    context: Context,
    hidden_share: float | jax.Array = 1.0,
) -> LoopStates:
    """Runs the prelude, all loops and the coda over whole sequences; embeddings [B, T, D].

    With more than two loops, loops 2..L are one scan that holds the model's parameters fixed, so
    that the program's size does not grow with L.

    Args:
      hidden_share: factor of the scale of the previous loop's output.
    """
    loop = config.loop
    shift = partial(shift_states, documents_BT=context.documents_BT)

    first_BTD, prelude = model.layers("prelude", embeddings_BTD, context)
    hidden_BTD, outputs = model.layers("core", first_BTD, context)
    loops = jax.tree.map(lambda x: x[None], _ended(hidden_BTD, outputs))
    shared = None
    if loop.later_attention != "own":
        shared = {name: layers.keys_values for name, layers in outputs.items()}

    def later_loop(model, hidden_BTD, index):
        output_BTD = loop_output(loop, hidden_BTD, model.normalize_loop)
        hidden_scale = hidden_share * model.hidden_scale()
        x_BTD = next_loop_input(loop, first_BTD, output_BTD, shift, hidden_scale)
        hidden_BTD, outputs = model.layers("core", x_BTD, context._replace(loop=index), shared)
        return hidden_BTD, (output_BTD, _ended(hidden_BTD, outputs))

    read = []
    if loop.count > 1:
        if loop.count == 2:
            # A scan of one turn would still stack what the backward pass needs: XLA leaves the
            # copies.
            hidden_BTD, second = later_loop(model, hidden_BTD, 1)
            output_LBTD, later = jax.tree.map(lambda x: x[None], second)
        else:
            later_loops = nn.scan(
                later_loop,
                variable_broadcast="params",
                split_rngs={"params": False},
                check_constancy_invariants=False,  # it would trace the loop twice
                length=loop.count - 1,
            )
            hidden_BTD, (output_LBTD, later) = later_loops(
                model, hidden_BTD, jnp.arange(1, loop.count)
            )
        gate_LJB, later = later.gate_JB, later._replace(gate_JB=None)
        loops = _joined([loops, later])._replace(gate_JB=gate_LJB)
        read = [output_LBTD]
    coda_BTD, coda = model.layers("coda", hidden_BTD, context)
    read.append(model.normalize(coda_BTD)[None])
    outer = [router for router in map(_router, (prelude, coda)) if router is not None]
    return LoopStates(
        loops.hidden_BTD,
        jnp.concatenate(read),
        loops.router,
        jax.tree.map(lambda x: x[None], _joined(outer)) if outer else None,
        loops.rms_BT,
        loops.gate_JB,
    )


class _Ended(NamedTuple):
    """What one loop leaves, or, with a leading axis, several; see `LoopStates`."""

    hidden_BTD: jax.Array
    router: RouterStatistics | None
    rms_BT: jax.Array
    gate_JB: jax.Array | None


def _ended(hidden_BTD: jax.Array, outputs: dict[str, LayerOutputs]) -> _Ended:
    rms_BT = jnp.sqrt(jnp.mean(jnp.square(hidden_BTD.astype(jnp.float32)), axis=-1))
    gates = [layers.gate_B for layers in outputs.values() if layers.gate_B is not None]
    return _Ended(hidden_BTD, _router(outputs), rms_BT, jnp.concatenate(gates) if gates else None)


def _router(outputs: dict[str, LayerOutputs]) -> RouterStatistics | None:
    """The routers' statistics of a part's layers, of which one stack at most has routers."""
    return next((layers.router for layers in outputs.values() if layers.router is not None), None)


def _joined(trees: list[Any]) -> Any:
    """Trees of arrays, concatenated along their first axes."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *trees)
