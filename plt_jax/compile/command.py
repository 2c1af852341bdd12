"""Compiles a configuration's step for a topology, and estimates its cost."""

from __future__ import annotations

from plt_jax.compile.activations import kept_activations
from plt_jax.compile.estimate import Estimate, estimate
from plt_jax.compile.program import compile_step, decode_step, tpu_mesh, train_step
from plt_jax.config import RunConfig
from plt_jax.distributed.chips import Topology
from plt_jax.model.arithmetic import decode_flops, train_flops
from plt_jax.training.program import TrainProgram


def compile_config(
    config: RunConfig, topology: Topology, decode: tuple[int, int] | None = None
) -> Estimate:
    """Compiles a configuration's step for a topology, and estimates its memory and time.

    Args:
      decode: the decode step's batch size and cache positions; None for the train step.

    Raises:
      InputError: libtpu is missing, or the configuration does not fit the devices.
    """
    mesh = tpu_mesh(config, topology)
    if decode is not None:
        batch, context = decode
        compiled = compile_step(decode_step(config, mesh, batch, context), mesh)
        return estimate(topology, mesh, compiled, decode_flops(config.model, *decode), batch)
    program = TrainProgram.build(config, mesh)
    activations = kept_activations(program)
    compiled = compile_step(train_step(program), mesh)
    tokens = config.training.batch_size * config.sequence_length
    return estimate(topology, mesh, compiled, train_flops(config), tokens, activations)
