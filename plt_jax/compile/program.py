"""Compiles a step for devices that are not here, from shapes and shardings instead of arrays."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plt_jax.compile.shapes import DecodeShape
from plt_jax.config import RunConfig
from plt_jax.distributed.chips import Topology
from plt_jax.distributed.gpus import GpuTopology
from plt_jax.distributed.mesh import abstract_arrays, make_mesh, use_mesh
from plt_jax.errors import InputError
from plt_jax.training.program import TrainProgram

QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask a metadata server that only TPU machines have
    "TPU_ACCELERATOR_TYPE": "v5p-128",  # libtpu wants these two, but does not use them here
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # processes share no device here
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def tpu_mesh(config: RunConfig, topology: Topology) -> Mesh:
    """Lays the configuration's mesh over the devices of a topology.

    Raises:
      InputError: libtpu is missing or refuses the topology, or the mesh does not fit the devices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "compiling for TPUs needs the package libtpu, which is not installed; "
            "pip install '.[tpu]'"
        )
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    jax.config.update("jax_platforms", "cpu")
    # The cache stores programs for absent devices, but cannot load them again.
    jax.config.update("jax_enable_compilation_cache", False)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # by default a host has two or four
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except Exception as error:  # jaxlib's own error types differ by version
        raise InputError(f"libtpu has no {topology.name}: {error}") from error
    if len(description.devices) != topology.devices:
        raise InputError(
            f"libtpu makes {len(description.devices)} devices of {topology.name} instead of "
            f"{topology.devices}; use another version of libtpu"
        )
    return make_mesh(config.mesh, description.devices)


def gpu_mesh(config: RunConfig, topology: GpuTopology) -> Mesh:
    """Lays the configuration's mesh over cards of one host.

    Raises:
      InputError: XLA's compiler for NVIDIA GPUs is missing or refuses the card, or the mesh does
        not fit the cards.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
        raise InputError(
            "compiling for GPUs needs JAX's CUDA plugin, which is not installed; "
            "pip install '.[gpu_compile]'"
        )
    # The plugin would refuse to start without a card and its libraries.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # as for TPUs
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x1x{topology.devices}",
            target_config=topology.gpu.describe(),
        )
    except Exception as error:  # jaxlib's own error types differ by version
        raise InputError(f"XLA cannot compile for {topology.gpu.name}: {error}") from error
    return make_mesh(config.mesh, description.devices)


@dataclass
class Memory:
    """The bytes of memory that a step takes on one device."""

    parts: dict[str, int]
    """Arguments by name: parameters, optimizer state and batch, or weights, cache and tokens."""
    arguments: int = 0
    """All arguments, in the compiler's layouts."""
    outputs: int = 0
    """Results that do not reuse the memory of arguments."""
    temporaries: int = 0
    """Arrays that the program holds while it runs."""
    code: int = 0
    refused: str | None = None
    """The compiler's message, if it refused the program because memory does not suffice."""
    needed: int = 0
    """The whole program: the sum of the above, or the compiler's figure if it refused."""
    available: int = 0
    """The compiler's limit, if its refusal names it; else 0."""


@dataclass
class Compiled:
    """A compiled step, or one that the compiler refused because memory does not suffice."""

    memory: Memory
    text: str | None
    """The program's HLO text; None if it was refused."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of tracing and lowering, and of compiling."""


@dataclass
class Step:
    """A step that can be compiled: a function and its abstract arguments."""

    function: Callable
    """The function, jitted."""
    arguments: tuple[Any, ...]
    parts: Mapping[str, Any]
    """The arguments by the names that reports use."""


def train_step(program: TrainProgram) -> Step:
    """The train step of a run."""
    state, batch = program.abstract_state, program.abstract_batch
    parts = {
        "parameters": state.params,
        "optimizer state": (state.step, state.opt_state),
        "batch": batch,
    }
    arguments = (state, batch, program.abstract_limits)
    return Step(program.jitted_step, arguments, parts)


def decode_step(config: RunConfig, mesh: Mesh, shape: DecodeShape) -> Step:
    """The decode step.

    `prepare_for_decode` and `init_cache` are compiled, too, to learn how they lay weights and cache
    over the mesh.

    Raises:
      InputError: sizes do not divide over the mesh.
    """
    from plt_jax.decoding.cache import init_cache
    from plt_jax.decoding.step import decode_step as step
    from plt_jax.decoding.weights import prepare_for_decode
    from plt_jax.model.transformer import abstract_params

    model, batch = config.model, shape.batch
    params = abstract_arrays(abstract_params(model), mesh)
    with use_mesh(mesh):
        weights = _abstract_outputs(
            lambda params: prepare_for_decode(model, params, shape.weights), params
        )
        cache = _abstract_outputs(lambda: init_cache(model, batch, shape.context))
    whole = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=whole)
    function = jax.jit(step, static_argnums=0, donate_argnums=3)
    parts = {"weights": weights, "cache": cache, "tokens": tokens}
    return Step(function, (model, weights, tokens, cache), parts)


def generation_step(config: RunConfig, mesh: Mesh, shape: DecodeShape) -> Step:
    """The loop of greedy generation, whose body is the decode step and the choice of a token.

    The arguments are those of `decode_step`.
    """
    from plt_jax.decoding.generation import GenerationState, TokenChoice, advance
    from plt_jax.decoding.sampling import Sampling

    step, batch = decode_step(config, mesh, shape), shape.batch
    model, weights, tokens, cache = step.arguments

    def whole(sizes: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=tokens.sharding)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = GenerationState(cache, tokens, whole((batch,), bool), whole((), jnp.int32))
    arguments = (
        *(model, TokenChoice(Sampling(), False), weights, whole(keys.shape, keys.dtype)),
        *(whole((batch, 1), jnp.int32), state, whole((), jnp.int32)),
    )
    return Step(advance, arguments, step.parts)


def _abstract_outputs(make: Callable, *arguments: Any) -> Any:
    """Shapes, dtypes and shardings of a function's results when it is compiled."""
    lowered = jax.jit(make).lower(*arguments)
    shapes = jax.eval_shape(make, *arguments)
    shardings = lowered.compile().output_shardings
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(shardings)),
    )


def compile_step(step: Step, mesh: Mesh) -> Compiled:
    """Compiles a step for the devices of its mesh, or records that their memory does not suffice.

    Raises:
      InputError: tracing refuses the configuration.
    """
    memory = Memory({name: device_bytes(tree) for name, tree in step.parts.items()})
    start = time.perf_counter()
    with use_mesh(mesh):
        lowered = step.function.lower(*step.arguments)
        seconds = {"lowering": time.perf_counter() - start}
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except Exception as error:  # jaxlib's own error types differ by version
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds["compiling"] = time.perf_counter() - start
            return Compiled(refusal(memory, str(error)), None, seconds)
    seconds["compiling"] = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    memory.arguments = analysis.argument_size_in_bytes
    memory.outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory.temporaries = analysis.temp_size_in_bytes
    memory.code = analysis.generated_code_size_in_bytes
    memory.needed = memory.arguments + memory.outputs + memory.temporaries + memory.code
    return Compiled(memory, compiled.as_text(), seconds)


def device_bytes(tree: Any) -> int:
    """Bytes on one device of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def refusal(memory: Memory, message: str) -> Memory:
    """Adds what the compiler's refusal says to `memory`, and returns it.

    The message holds `Used 454.2G of 95.73G hbm`, or `HLO temporaries (454G) exceeds available HBM
    (95.73G)`.
    """
    memory.refused = " ".join(message.split())
    size = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
    used = re.search(rf"Used {size} of {size} hbm", memory.refused)
    exceeds = re.search(rf"{size} exceeds available HBM {size}", memory.refused)
    found = used or exceeds
    if found:
        needed, available = (
            int(float(number) * _UNITS[unit])
            for number, unit in (found.group(1, 2), found.group(3, 4))
        )
        memory.needed, memory.available = needed, available
        if exceeds and not used:
            memory.temporaries = needed
    return memory
