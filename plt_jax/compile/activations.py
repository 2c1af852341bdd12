"""What a train step keeps of its forward pass for the backward pass, counted from the real program.

`jax.vjp` of the loss is traced; what its pullback holds and depends on the batch is counted. Copies
of parameters (casts) do not count. The compiler may keep less: it makes some of these arrays again,
above all those of the size of the logits. What it keeps is part of its temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import Mesh

from plt_jax.config import RunConfig
from plt_jax.distributed.mesh import mesh_axes, use_mesh


class Activations(NamedTuple):
    """Bytes on one device of what one micro-batch keeps."""

    layers: int
    """States, keys and values, and whatever else is as large as the model is wide."""
    logits: int
    """Arrays with the vocabulary as an axis."""


def kept_activations(config: RunConfig, mesh: Mesh) -> Activations:
    """What the backward pass of a step's loss is given.

    Arrays are divided by the devices over which sequences and positions lie; a tensor axis, which
    splits some of them further, is left out.
    """
    from plt_jax.training.step import abstract_batch, abstract_state, batch_loss

    params = abstract_state(config, mesh).params
    batch = {
        name: jax.ShapeDtypeStruct(
            (array.shape[0] // config.training.accumulate, array.shape[1]), array.dtype
        )
        for name, array in abstract_batch(config, mesh).items()
    }

    def kept(params: Any, batch: Any) -> list[jax.Array]:
        def loss(params):
            return batch_loss(config.model, params, batch, config.training.z_loss)

        return jax.tree.leaves(jax.vjp(loss, params, has_aux=True)[1])

    with use_mesh(mesh):
        traced = jax.make_jaxpr(kept)(params, batch).jaxpr
    of_batch = [False] * len(jax.tree.leaves(params)) + [True] * len(jax.tree.leaves(batch))
    arrays = {
        value: value.aval
        for value, varies in zip(traced.outvars, depends(traced, of_batch), strict=True)
        if varies and value not in traced.invars
    }
    sizes = {True: 0, False: 0}
    for array in arrays.values():
        sizes[config.model.vocab_size in array.shape] += _bytes(array)
    devices = math.prod(mesh.shape[axis] for axis in mesh_axes("batch") + mesh_axes("length"))
    return Activations(sizes[False] // devices, sizes[True] // devices)


def _bytes(array: Any) -> int:
    try:
        item = np.dtype(array.dtype).itemsize
    except TypeError:
        item = 4  # an extended type, such as a key
    return math.prod(array.shape) * item


def depends(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of a traced function depend on some of its inputs."""
    marked = {value for value, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(value: Any) -> bool:
        return not isinstance(value, Literal) and value in marked

    for equation in jaxpr.eqns:
        marks = [is_marked(value) for value in equation.invars]
        if any(marks):
            outputs = _of_equation(equation, marks)
            marked.update(
                value for value, mark in zip(equation.outvars, outputs, strict=True) if mark
            )
    return [is_marked(value) for value in jaxpr.outvars]


def _of_equation(equation: Any, marks: list[bool]) -> list[bool]:
    inner = [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in equation.params.values()
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
    if len(inner) != 1 or len(inner[0].invars) != len(marks):
        return [True] * len(equation.outvars)
    if equation.primitive.name != "scan":
        outputs = depends(inner[0], marks)
        return outputs if len(outputs) == len(equation.outvars) else [True] * len(equation.outvars)
    # What a scan carries has the shape outside that it has inside; what it stacks has an axis more.
    carried = _alike(inner[0].outvars, equation.outvars)
    constants = _alike(inner[0].invars, equation.invars) - carried
    while True:
        outputs = depends(inner[0], marks)
        grown = list(marks)
        for index in range(carried):
            grown[constants + index] |= outputs[index]
        if grown == marks:
            return outputs
        marks = grown


def _alike(inside: Sequence[Any], outside: Sequence[Any]) -> int:
    """How many values have as many axes inside a scan's body as outside."""
    pairs = zip(inside, outside, strict=True)
    return sum(one.aval.ndim == other.aval.ndim for one, other in pairs)
