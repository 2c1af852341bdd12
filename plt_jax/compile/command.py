"""Compiles a configuration's step for a topology, and estimates its cost."""

from __future__ import annotations

from plt_jax.compile.activations import kept_activations
from plt_jax.compile.estimate import Estimate, estimate
from plt_jax.compile.program import compile_step, decode_step, tpu_mesh, train_step
from plt_jax.compile.shapes import DecodeShape
from plt_jax.config import RunConfig
from plt_jax.distributed.chips import Topology
from plt_jax.model.arithmetic import decode_flops, train_flops
from plt_jax.training.program import TrainProgram


def compile_config(
    config: RunConfig, topology: Topology, decode: DecodeShape | None = None
) -> Estimate:
    """Compiles a configuration's step for a topology, and estimates its memory and time.

    Args:
      decode: the decode step; None for the train step.

    Raises:
      InputError: libtpu is missing, or the configuration does not fit the devices.
    """
    mesh = tpu_mesh(config, topology)
    if decode is not None:
        compiled = compile_step(decode_step(config, mesh, decode), mesh)
        flops = decode_flops(config.model, decode.batch, decode.context)
        return estimate(topology, mesh, compiled, flops, decode.batch)
    program = TrainProgram.build(config, mesh)
    activations = kept_activations(program)
    compiled = compile_step(train_step(program), mesh)
    tokens = config.training.batch_size * config.sequence_length
    return estimate(topology, mesh, compiled, train_flops(config), tokens, activations)
