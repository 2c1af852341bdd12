"""The program of training that a configuration and a mesh determine, built once per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plt_jax.config import ModelConfig, RunConfig
from plt_jax.distributed.mesh import BatchLayout, abstract_arrays, batch_layout, use_mesh
from plt_jax.model.transformer import Transformer, abstract_params
from plt_jax.training.guard import Limits
from plt_jax.training.objective import Batch, Metrics
from plt_jax.training.optimizer import make_optimizer, make_schedule
from plt_jax.training.step import TrainState, make_train_step


@dataclass(frozen=True)
class TrainProgram:
    """The optimizer, the train state's and the batch's shardings, and the jitted step of a run."""

    config: RunConfig
    mesh: Mesh
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    """Shapes, dtypes and shardings of the train state."""
    batch_layout: BatchLayout
    """Where a step's batch lies, and which of its rows this process reads."""
    jitted_step: Callable[[TrainState, Batch, Limits], tuple[TrainState, Metrics]]
    """The step of `make_train_step`, jitted for the mesh; it donates the state. It must be called,
    or lowered for devices that are not here, under `use_mesh(mesh)`: see `step`."""

    @classmethod
    def build(cls, config: RunConfig, mesh: Mesh) -> TrainProgram:
        """The program of a configuration; neither arrays are made nor anything is compiled.

        Raises:
          InputError: the batch, the sequence or a parameter does not divide over the mesh.
        """
        layout = batch_layout(
            mesh,
            ("training.batch_size", config.training.batch_size),
            ("data.sequence_length", config.sequence_length),
            config.training.accumulate,
        )
        schedule = make_schedule(config.optimizer, config.training.steps)
        optimizer = make_optimizer(config.optimizer, config.model, schedule)
        params = abstract_params(config.model)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32)
        boxed = TrainState(step, params, jax.eval_shape(optimizer.init, params))
        abstract = abstract_arrays(boxed, mesh)
        replicated = NamedSharding(mesh, PartitionSpec())
        shardings = _shardings(abstract)
        jitted = jax.jit(
            make_train_step(config, optimizer, schedule),
            in_shardings=(shardings, layout.sharding, replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
        return cls(config, mesh, optimizer, abstract, layout, jitted)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a step's batch, [B, T] each: `tokens`, `targets` and
        `segment_ids`, int32, and `weights`, float32."""
        shape = (self.batch_layout.batch_size, self.config.sequence_length)
        dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32}
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_layout.sharding)
            for name, dtype in {**dtypes, "weights": jnp.float32}.items()
        }

    @property
    def abstract_limits(self) -> Limits:
        """Shapes, dtypes and shardings of a step's limits."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
        return Limits(scalar, scalar)

    def init_state(self) -> TrainState:
        """The train state of step 0, with fresh parameters."""
        return self.start_state(self.init_params())

    def init_params(self) -> Any:
        """Fresh parameters from the run's seed; each device draws its own shard, so that no device
        ever holds all of them."""
        shardings = _shardings(self.abstract_state.params)
        # One program for each top-level parameter: random numbers take several times the memory of
        # what they become. The mesh is not current, since initialisation runs a stack on one
        # token, which cannot be sharded.
        key = jax.random.key(self.config.seed)
        return {
            name: jax.block_until_ready(
                jax.jit(_init, static_argnums=(0, 1), out_shardings=shardings[name])(
                    self.config.model, name, key
                )
            )
            for name in shardings
        }

    def start_state(self, params: Any) -> TrainState:
        """The train state of step 0 around given parameters, which must have their shardings."""
        shardings = _shardings(self.abstract_state)

        def start(params: Any) -> tuple[jax.Array, optax.OptState]:
            return jnp.zeros((), jnp.int32), self.optimizer.init(params)

        with use_mesh(self.mesh):
            step, opt_state = jax.jit(start, out_shardings=(shardings.step, shardings.opt_state))(
                params
            )
        return TrainState(step, params, opt_state)

    def step(
        self, state: TrainState, batch: Batch, limits: Limits = Limits()
    ) -> tuple[TrainState, Metrics]:
        """One step: the new state and the metrics of `make_train_step`. The given state's arrays
        are donated."""
        with use_mesh(self.mesh):
            return self.jitted_step(state, batch, limits)


def _init(config: ModelConfig, name: str, key: jax.Array) -> Any:
    """A model's top-level parameter of a name, fresh from a key."""
    variables: Any = Transformer(config).init(key, name, method="declare_one")
    return nn.unbox(variables["params"])[name]


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
