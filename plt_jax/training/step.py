"""The train step: loss on the last loop, gradients, one optimizer update; jitted, state donated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plt_jax.config import ModelConfig, RunConfig
from plt_jax.distributed.mesh import BatchLayout, abstract_arrays, batch_layout, use_mesh
from plt_jax.model.looping import LoopStates
from plt_jax.model.loss import cross_entropy
from plt_jax.model.moe import (
    RouterStatistics,
    auxiliary_loss,
    balance_step,
    experts_per_step,
    load_entropy,
)
from plt_jax.model.transformer import Transformer, abstract_params
from plt_jax.training.guard import Limits
from plt_jax.training.optimizer import make_optimizer, make_schedule

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """What a training step reads and writes."""

    step: jax.Array
    """int32 scalar: steps taken, skipped ones too."""
    params: Any
    """float32, as `Transformer.init` gives them, unboxed."""
    opt_state: optax.OptState


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the train state, without making it."""
    optimizer = make_optimizer(config.optimizer, config.model, config.training.steps)
    params = abstract_params(config.model)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    boxed = TrainState(step, params, jax.eval_shape(optimizer.init, params))
    return abstract_arrays(boxed, mesh)


def training_layout(config: RunConfig, mesh: Mesh) -> BatchLayout:
    """Where a step's batch lies.

    Raises:
      InputError: it does not divide over the mesh.
    """
    training = config.training
    return batch_layout(
        mesh,
        ("training.batch_size", training.batch_size),
        ("data.sequence_length", config.sequence_length),
        training.accumulate,
    )


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a step's batch, [B, T] each: `tokens`, `targets` and
    `segment_ids`, int32, and `weights`, float32."""
    layout = training_layout(config, mesh)
    shape = (layout.batch_size, config.sequence_length)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding)
        for name, dtype in {**dtypes, "weights": jnp.float32}.items()
    }


def abstract_limits(mesh: Mesh) -> Limits:
    """Shapes, dtypes and shardings of a step's limits."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    return Limits(scalar, scalar)


def init_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """A fresh train state, made straight into its shardings from the run's seed."""
    return start_state(config, mesh, init_params(config, mesh))


def init_params(config: RunConfig, mesh: Mesh) -> Any:
    """Fresh parameters; each device draws its own part, and nobody has the whole."""
    model = Transformer(config.model)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params)

    def init(key: jax.Array, name: str) -> Any:
        return nn.unbox(model.init(key, method="declare_all")["params"])[name]

    # One program for each part: random numbers take several times the memory of what they become.
    # Not under the mesh: initialisation runs the model on one token, which divides over no devices.
    key = jax.random.key(config.seed)
    return {
        name: jax.block_until_ready(
            jax.jit(init, static_argnums=1, out_shardings=shardings[name])(key, name)
        )
        for name in shardings
    }


def start_state(config: RunConfig, mesh: Mesh, params: Any) -> TrainState:
    """The train state of step 0 around given parameters, which lie in their shardings already."""
    optimizer = make_optimizer(config.optimizer, config.model, config.training.steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))

    def start(params: Any) -> tuple[jax.Array, optax.OptState]:
        return jnp.zeros((), jnp.int32), optimizer.init(params)

    with use_mesh(mesh):
        step, opt_state = jax.jit(start, out_shardings=(shardings.step, shardings.opt_state))(
            params
        )
    return TrainState(step, params, opt_state)


def batch_loss(
    config: ModelConfig, params: Any, batch: Batch, z_loss: float
) -> tuple[jax.Array, Metrics]:
    """The loss to minimise, summed in nats over the batch's targets, and sums to report."""

    def forward(model: Transformer) -> tuple[jax.Array, LoopStates]:
        states = model.loop_states(batch["tokens"], segment_ids=batch["segment_ids"])
        return model.logits(states.output_LBTD[-1]), states

    logits_BTV, states = Transformer(config).apply({"params": params}, method=forward)
    nll_BT, log_z_BT = cross_entropy(logits_BTV, batch["targets"])
    weights_BT, targets = batch["weights"], jnp.sum(batch["weights"])
    nll = jnp.sum(nll_BT * weights_BT)
    loss = nll + z_loss * jnp.sum(jnp.square(log_z_BT) * weights_BT)
    sums = {"loss": nll, "hidden_norm_by_loop": jnp.sum(states.rms_LBT * weights_BT, axis=(1, 2))}
    if states.gate_LJB is not None:
        sums["gate_by_loop"] = jnp.sum(states.gate_LJB * jnp.sum(weights_BT, axis=1), axis=-1)
    router = states.router
    if router is not None:
        loss += targets * auxiliary_loss(config.moe, router)
        sums["experts_per_step"] = targets * jnp.mean(
            jax.vmap(experts_per_step, in_axes=1)(router.chosen_BTk)
        )
        sums["router"] = jax.tree.map(lambda mean: targets * mean, router._replace(chosen_BTk=None))
    return loss, sums


def accumulate_gradients(config: RunConfig, params: Any, batch: Batch) -> tuple[Metrics, Any]:
    """Metrics, as means per target, and the gradient of the mean loss, over all micro-batches.

    Sums are divided once at the end, so the result does not depend on how targets fall into
    micro-batches, but for the routers' losses, which are one of each.
    """
    parts, z_loss = config.training.accumulate, config.training.z_loss
    gradient = jax.grad(
        lambda params, micro: batch_loss(config.model, params, micro, z_loss), has_aux=True
    )
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
    targets = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    return jax.tree.map(lambda summed: summed / targets, (sums, grads))


def router_metrics(router: RouterStatistics) -> Metrics:
    """What the routers of all loops and layers did, from their statistics [L, J, ...].

    `expert_load_entropy` (mean; 1 is even), `expert_max_load` (largest share of one expert in any
    loop and layer), `expert_dropped` (share of choices that no expert worked on). For each loop and
    layer, [L, J]: the same as `..._by_loop`, and `router_z_by_loop`, the mean squared
    log-normaliser.
    """
    entropy_LJ, largest_LJ = load_entropy(router.load_X), jnp.max(router.load_X, axis=-1)
    return {
        "expert_load_entropy": jnp.mean(entropy_LJ),
        "expert_max_load": jnp.max(largest_LJ),
        "expert_dropped": jnp.mean(router.dropped),
        "expert_load_entropy_by_loop": entropy_LJ,
        "expert_max_load_by_loop": largest_LJ,
        "expert_dropped_by_loop": router.dropped,
        "router_z_by_loop": router.squared_log_z,
    }


def first_loop_and_layer(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Which loop and layer, counted from 1, metrics by loop and layer begin with."""
    experts = 1, config.moe.dense_layers + 1
    return {
        "gate_by_loop": (2, 1),
        "expert_load_entropy_by_loop": experts,
        "expert_max_load_by_loop": experts,
        "expert_dropped_by_loop": experts,
        "router_z_by_loop": experts,
    }


def norms(name: str, tree: Any) -> Metrics:
    """The norm of every leaf, over all layers of a stack, as `NAME/layers.q` and so on."""
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='.')}": optax.global_norm(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def balance_routers(config: ModelConfig, params: Any, router: RouterStatistics) -> Any:
    """Parameters whose router biases, if there are any, have moved towards an even load."""
    layers = params["layers"]
    if "router_bias" not in layers:
        return params
    moved_LJX = balance_step(config.moe, router.load_X)
    bias_JLX = layers["router_bias"] + moved_LJX.swapaxes(0, 1)
    return params | {"layers": layers | {"router_bias": bias_JLX}}


def _is_schedules(path: tuple[Any, ...], _: Any) -> bool:
    return getattr(path[-1], "tuple_name", None) == optax.ScaleByScheduleState.__name__


def jit_train_step(config: RunConfig, mesh: Mesh) -> Callable:
    """`(state, batch, limits) -> (state, metrics)`, jitted for the mesh; the state is donated.

    To be called, or lowered for devices that are not here, under `use_mesh(mesh)`. A batch is as
    `abstract_batch` says. Metrics are float32, the same on all devices: the scalars `loss` in nats
    per target, `gradient_norm` before clipping, `learning_rate`, and `skipped`, 1 where the loss or
    the norm was not finite or above its limit, so that parameters and optimizer stayed as they
    were; `norms` of gradients and updates; for each loop, [L], `hidden_norm_by_loop`, the root mean
    square of its states; for each loop with gates and layer, [L-1, J], `gate_by_loop`, the mean
    weight of attention to loop 1 in G-SWA; with experts also `experts_per_step` (see there) and
    those of `router_metrics`.
    """
    optimizer = make_optimizer(config.optimizer, config.model, config.training.steps)
    schedule = make_schedule(config.optimizer, config.training.steps)

    def train_step(state: TrainState, batch: Batch, limits: Limits) -> tuple[TrainState, Metrics]:
        means, grads = accumulate_gradients(config, state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        router = means.pop("router", None)
        # Not the step's number: those that are skipped do not count.
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
        if router is not None:
            metrics |= router_metrics(router)
            params = balance_routers(config.model, params, router)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(
        train_step,
        in_shardings=(shardings, training_layout(config, mesh).sharding, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def make_train_step(
    config: RunConfig, mesh: Mesh
) -> Callable[[TrainState, Batch, Limits], tuple[TrainState, Metrics]]:
    """`step(state, batch, limits=Limits()) -> (state, metrics)`: `jit_train_step`, called under its
    mesh."""
    jitted = jit_train_step(config, mesh)

    def step(
        state: TrainState, batch: Batch, limits: Limits = Limits()
    ) -> tuple[TrainState, Metrics]:
        with use_mesh(mesh):
            return jitted(state, batch, limits)

    return step
