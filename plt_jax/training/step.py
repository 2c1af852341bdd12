"""The train step: the loss, its gradients, one optimizer update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from plt_jax.config import ModelConfig, RunConfig
from plt_jax.model.block import stacks_of
from plt_jax.model.moe import RouterStatistics, balance_step, load_entropy, mean_of_all
from plt_jax.training.guard import Limits
from plt_jax.training.objective import ROUTERS, Batch, Metrics, batch_loss


@flax.struct.dataclass
class TrainState:
    """The arrays that a training step reads and replaces."""

    step: jax.Array
    """int32 scalar: steps taken, skipped ones too."""
    params: Any
    """float32, as `Transformer.init` gives them, unboxed."""
    opt_state: optax.OptState


def accumulate_gradients(
    config: RunConfig, params: Any, batch: Batch, step: jax.Array
) -> tuple[Metrics, Any]:
    """Metrics, as means per target, and the gradient of the mean loss, over all micro-batches.

    Losses are divided by the targets of all micro-batches, so that the result does not depend on
    how targets are spread over them. Only the routers' losses depend on it: each micro-batch has
    its own.
    """
    parts = config.training.accumulate
    targets = jnp.maximum(jnp.sum(batch["weights"]), 1.0)

    def share_of_mean(params: Any, micro: Batch) -> tuple[jax.Array, Metrics]:
        # The loss, not its gradients, which are as many as the parameters.
        loss, sums = batch_loss(config, params, micro, step)
        return loss / targets, sums

    gradient = jax.grad(share_of_mean, has_aux=True)
    if parts == 1:
        grads, sums = gradient(params, batch)
    else:

        def add(sums, micro):
            return jax.tree.map(jnp.add, sums, gradient(params, micro)), None

        # Strided, so that every micro-batch has rows on every device.
        micros = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, micros)
    # Sums are divided, not weights: a share of one half must come out as exactly that, since even
    # loads move no router's bias.
    return jax.tree.map(lambda summed: summed / targets, sums), grads


def router_metrics(routers: dict[str, RouterStatistics]) -> Metrics:
    """Metrics of the routers of all loops and layers, by their names among `LoopStates`.

    Scalars are `expert_load_entropy` (the mean; 1 is an even load), `expert_max_load` (the largest
    share of one expert in any loop and layer) and `expert_dropped` (the share of choices that no
    expert computed). For each loop and looped layer, [L, J], there are the same as `..._by_loop`,
    and `router_z_by_loop`, the mean squared log-normaliser.
    """
    entropy = {name: load_entropy(router.load_X) for name, router in routers.items()}
    largest = {name: jnp.max(router.load_X, axis=-1) for name, router in routers.items()}
    metrics = {
        "expert_load_entropy": mean_of_all(list(entropy.values())),
        "expert_max_load": jnp.max(jnp.stack([jnp.max(one) for one in largest.values()])),
        "expert_dropped": mean_of_all([router.dropped for router in routers.values()]),
    }
    if "router" in routers:
        metrics |= {
            "expert_load_entropy_by_loop": entropy["router"],
            "expert_max_load_by_loop": largest["router"],
            "expert_dropped_by_loop": routers["router"].dropped,
            "router_z_by_loop": routers["router"].squared_log_z,
        }
    return metrics


def first_loop_and_layer(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The numbers, from 1, of the first loop and layer of metrics by loop and layer, by metric."""
    experts = 1, config.first_routed_layer + 1
    return {
        "gate_by_loop": (2, config.looped_layers.start + 1),
        "expert_load_entropy_by_loop": experts,
        "expert_max_load_by_loop": experts,
        "expert_dropped_by_loop": experts,
        "router_z_by_loop": experts,
    }


def norms(name: str, tree: Any) -> Metrics:
    """The norm of every leaf, over all layers of a stack, as `NAME/layers.q` and so on.

    Args:
      name: the beginning of the metrics' names.
      tree: gradients or updates, a tree like the parameters.
    """
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='.')}": optax.global_norm(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def balance_routers(config: ModelConfig, params: Any, routers: dict[str, RouterStatistics]) -> Any:
    """Parameters with their router biases, if they have any, moved towards an even load.

    Args:
      routers: the statistics, by their names among `LoopStates`.
    """
    if config.moe.bias_update_rate is None:
        return params
    balanced, outer = {}, 0
    for name, stack in stacks_of(config).items():
        if not stack.mixture:
            continue
        if stack.part == "core":
            load_LJX = routers["router"].load_X
        else:
            load_LJX = routers["outer_router"].load_X[:, outer : outer + stack.layers]
            outer += stack.layers
        moved_LJX = balance_step(config.moe, load_LJX)
        bias_JLX = params[name]["router_bias"] + moved_LJX.swapaxes(0, 1)
        balanced[name] = params[name] | {"router_bias": bias_JLX}
    return params | balanced


def _is_schedules(path: tuple[Any, ...], _: Any) -> bool:
    return getattr(path[-1], "tuple_name", None) == optax.ScaleByScheduleState.__name__


def make_train_step(
    config: RunConfig, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch, Limits], tuple[TrainState, Metrics]]:
    """The function `train_step(state, batch, limits) -> (state, metrics)`, not jitted.

    A batch is as `TrainProgram.abstract_batch` says. The step is skipped, and leaves parameters and
    optimizer state as they were, where the loss or the gradient norm is not finite or above its
    limit.

    Metrics are float32 and the same on all devices:
      loss: nats per target, of the last loop, or of the loop that training.loop_counts drew.
      loss_by_loop: [L], with losses at every loop only; exit_by_loop: [L], the mean probability to
        exit after each loop, with training.exit_entropy only; loops: the number of loops that was
        drawn, with training.loop_counts only.
      gradient_norm: before clipping; `gradient_norm/NAME` and `update_norm/NAME` of each parameter.
      learning_rate: that of the update.
      skipped: 1 if the step was skipped, else 0.
      hidden_norm_by_loop: [L], the root mean square of each loop's states.
      gate_by_loop: [L-1, J], the mean weight of attention to loop 1 in G-SWA, of the looped layers,
        with gates only.
      experts_per_step: see `experts_per_step`, with experts only, as those of `router_metrics`.
    """

    def train_step(state: TrainState, batch: Batch, limits: Limits) -> tuple[TrainState, Metrics]:
        means, grads = accumulate_gradients(config, state.params, batch, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        routers: Any = {name: means.pop(name) for name in ROUTERS if name in means}
        # The optimizer's count, not the step's number: skipped steps do not move the schedule.
        taken = optax.tree_utils.tree_get(state.opt_state, "count", filtering=_is_schedules)
        metrics = {
            **means,
            "gradient_norm": optax.global_norm(grads),
            "learning_rate": jnp.asarray(schedule(taken), jnp.float32),
        }
        metrics |= norms("gradient_norm", grads) | norms("update_norm", updates)
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        sound = (loss <= limits.loss) & (norm <= limits.gradient_norm) & jnp.isfinite(loss + norm)
        metrics["skipped"] = 1.0 - sound.astype(jnp.float32)
        params = optax.apply_updates(state.params, updates)
        if routers:
            metrics |= router_metrics(routers)
            params = balance_routers(config.model, params, routers)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
