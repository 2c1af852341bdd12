"""What training minimises: the loss of a batch, at the last loop or at all of them.

The losses of loops are weighed by constants, or by the distribution of an exit gate; or the loop
whose loss is taken is drawn anew in each step. The routers' losses are added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig, RunConfig
from plt_jax.model.block import Context
from plt_jax.model.looping import LoopStates
from plt_jax.model.moe import auxiliary_loss, experts_per_step, mean_of_all
from plt_jax.model.transformer import Transformer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

ROUTERS = ("router", "outer_router")
"""The statistics of routers among `LoopStates`."""


def batch_loss(
    config: RunConfig, params: Any, batch: Batch, step: jax.Array | int
) -> tuple[jax.Array, Metrics]:
    """The loss to minimise, the weighted sum over the batch's targets in nats, and weighted sums to
    report.

    Args:
      step: the number of steps taken before this one, int32.
    """
    weights_BT, weight = batch["weights"], jnp.sum(batch["weights"])
    share = hidden_share(config, step)

    def forward(model: Transformer) -> tuple[Weighed, LoopStates]:
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        states = model.loop_states(tokens, segment_ids, hidden_share=share)
        context = model.context(tokens, segment_ids)
        return loop_losses(config, model, states, context, batch, step), states

    outputs: Any = Transformer(config.model).apply({"params": params}, method=forward)
    (loss, sums), states = outputs
    sums |= {"hidden_norm_by_loop": jnp.sum(states.rms_LBT * weights_BT, axis=(1, 2))}
    if states.gate_LJB is not None:
        sums["gate_by_loop"] = jnp.sum(states.gate_LJB * jnp.sum(weights_BT, axis=1), axis=-1)
    routers_loss, routers_sums = routers(config.model, states, weight)
    return loss + routers_loss, sums | routers_sums


def hidden_share(config: RunConfig, step: jax.Array | int) -> float | jax.Array:
    """The factor of hidden_scale in a step: 1, but in the warmup of hidden_scale."""
    steps = config.training.hidden_scale_warmup * config.training.steps
    return jnp.minimum(step / steps, 1.0) if steps else 1.0


class Weighed(NamedTuple):
    """The loss of the loops, and sums to report."""

    loss: jax.Array
    sums: dict[str, Any]


def loop_losses(
    config: RunConfig,
    model: Transformer,
    states: LoopStates,
    context: Context,
    batch: Batch,
    step: jax.Array | int,
) -> Weighed:
    """The loss of one loop or of all loops, as TrainingConfig says."""
    training, count = config.training, config.model.loop.count
    targets_BT, weights_BT = batch["targets"], batch["weights"]
    last_BTD = states.output_LBTD[-1]
    if training.loop_counts:
        drawn = drawn_loops(config, step)
        read_BTD = model.readout(states.hidden_LBTD[drawn - 1], context)
        loss, nll, _ = model.loss(read_BTD, targets_BT, weights_BT, training.z_loss)
        return Weighed(loss, {"loss": nll, "loops": drawn * jnp.sum(weights_BT)})
    if not training.loop_losses and training.exit_entropy is None:
        loss, nll, _ = model.loss(last_BTD, targets_BT, weights_BT, training.z_loss)
        return Weighed(loss, {"loss": nll})
    sums, total = {}, jnp.zeros(())
    weights: list[Any] = [*training.loop_losses, 1.0]
    if training.exit_entropy is not None:
        exits_LBT = model.exit_probabilities(states.hidden_LBTD)
        weights = list(exits_LBT)
        # The probability of a loop can be 0 in float32; p log p is 0 there.
        logs_LBT = jnp.log(jnp.maximum(exits_LBT, jnp.finfo(jnp.float32).tiny))
        entropy_BT = -jnp.sum(exits_LBT * logs_LBT, axis=0)
        total -= training.exit_entropy * jnp.sum(entropy_BT * weights_BT)
        sums["exit_by_loop"] = jnp.sum(exits_LBT * weights_BT, axis=(1, 2))
    nats = []
    for index, weight in enumerate(weights):
        is_last = index == count - 1
        read_BTD = last_BTD if is_last else model.readout(states.hidden_LBTD[index], context)
        one = model.loss(read_BTD, targets_BT, weight * weights_BT, training.z_loss)
        total += one.loss
        nats.append(jnp.sum(one.nll_BT * weights_BT))
    return Weighed(total, sums | {"loss": nats[-1], "loss_by_loop": jnp.stack(nats)})


def drawn_loops(config: RunConfig, step: jax.Array | int) -> jax.Array:
    """The number of loops whose loss a step takes, int32: the same for the same seed and step."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    shares = jnp.array(config.training.loop_counts)
    return 1 + jax.random.categorical(key, jnp.log(shares)).astype(jnp.int32)


def routers(
    config: ModelConfig, states: LoopStates, weight: jax.Array
) -> tuple[jax.Array | float, Metrics]:
    """The routers' losses, and their sums to report; none in dense models.

    Args:
      weight: the number of targets, by which means are multiplied.
    """
    found = {name: getattr(states, name) for name in ROUTERS}
    found = {name: router for name, router in found.items() if router is not None}
    if not found:
        return 0.0, {}
    sums: dict[str, Any] = {}
    read = [jax.vmap(experts_per_step, in_axes=1)(one.chosen_BTk) for one in found.values()]
    sums["experts_per_step"] = weight * mean_of_all(read)
    for name, router in found.items():
        sums[name] = jax.tree.map(lambda x: weight * x, router._replace(chosen_BTk=None))
    return weight * auxiliary_loss(config.moe, list(found.values())), sums
