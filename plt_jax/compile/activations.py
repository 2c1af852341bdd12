"""The activations that a train step keeps for its backward pass, counted in the traced program.

`jax.vjp` of the loss is traced. Counted are the arrays that its pullback holds and that depend on
the batch; copies of parameters (casts) are not. The compiler may keep less: it computes some arrays
again. What it keeps is a part of the program's temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from plt_jax.distributed.mesh import mesh_axes, use_mesh
from plt_jax.training.objective import batch_loss
from plt_jax.training.program import TrainProgram


class Activations(NamedTuple):
    """Bytes of one micro-batch's activations, on one device."""

    layers: int
    """Arrays of the layers: hidden states, keys, values and others."""
    head_gradient: int
    """The gradient of the head's weight, which the loss computes in the forward pass."""


def kept_activations(program: TrainProgram) -> Activations:
    """The bytes that the forward pass of one micro-batch's loss keeps for the backward pass.

    Activations are divided by the number of devices along the batch and length axes. The tensor
    axis, which divides some of them further, is not taken into account.
    """
    config, mesh, params = program.config, program.mesh, program.abstract_state.params
    batch = {
        name: jax.ShapeDtypeStruct(
            (array.shape[0] // config.training.accumulate, array.shape[1]), array.dtype
        )
        for name, array in program.abstract_batch.items()
    }

    def kept(params: Any, batch: Any) -> list[jax.Array]:
        def loss(params):
            return batch_loss(config, params, batch, 0)

        return jax.tree.leaves(jax.vjp(loss, params, has_aux=True)[1])

    with use_mesh(mesh):
        traced = jax.make_jaxpr(kept)(params, batch).jaxpr
    from_batch = [False] * len(jax.tree.leaves(params)) + [True] * len(jax.tree.leaves(batch))
    arrays = {
        value: value.aval
        for value, varies in zip(traced.outvars, depends(traced, from_batch), strict=True)
        if varies and value not in traced.invars
    }
    head = config.model.width, config.model.vocab_size
    layers = sum(_bytes(array) for array in arrays.values() if array.shape != head)
    gradient = sum(_bytes(array) for array in arrays.values() if array.shape == head)

    def devices(*logical: str) -> int:
        return math.prod(mesh.shape[axis] for name in logical for axis in mesh_axes(name))

    return Activations(layers // devices("batch", "length"), gradient // devices("embed", "vocab"))


def _bytes(array: Any) -> int:
    try:
        item = np.dtype(array.dtype).itemsize
    except TypeError:
        item = 4  # an extended type, such as a key
    return math.prod(array.shape) * item


def depends(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """For each output of a traced function, whether it depends on a marked input.

    Args:
      inputs: for each input, whether it is marked.
    """
    marked = {value for value, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(value: Any) -> bool:
        return not isinstance(value, Literal) and value in marked

    for equation in jaxpr.eqns:
        marks = [is_marked(value) for value in equation.invars]
        if any(marks):
            outputs = _marked_outputs(equation, marks)
            marked.update(
                value for value, mark in zip(equation.outvars, outputs, strict=True) if mark
            )
    return [is_marked(value) for value in jaxpr.outvars]


def _marked_outputs(equation: Any, marks: list[bool]) -> list[bool]:
    """The same for one equation; all outputs depend if its function cannot be followed."""
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
    # A scan's carry has the same axes outside as in the body; stacked values have one more outside.
    carried = _count_same_rank(inner[0].outvars, equation.outvars)
    constants = _count_same_rank(inner[0].invars, equation.invars) - carried
    while True:
        outputs = depends(inner[0], marks)
        grown = list(marks)
        for index in range(carried):
            grown[constants + index] |= outputs[index]
        if grown == marks:
            return outputs
        marks = grown


def _count_same_rank(inside: Sequence[Any], outside: Sequence[Any]) -> int:
    """How many values have as many axes in a scan's body as outside."""
    pairs = zip(inside, outside, strict=True)
    return sum(one.aval.ndim == other.aval.ndim for one, other in pairs)
