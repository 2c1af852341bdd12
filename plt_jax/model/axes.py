"""Where logical axes lie on the current mesh, for code that runs on each device by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec


def divisible() -> bool:
    """Whether there is a mesh of several devices to divide work over, and it is not yet divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types


def axes_of(logical: str) -> tuple[str, ...]:
    """The mesh axes over which a logical axis lies."""
    axes = nn.logical_to_mesh_axes((logical,))[0]
    return (axes,) if isinstance(axes, str) else axes or ()


def split_axes(logical: str) -> tuple[str, ...]:
    """Those along which several devices lie; none without a mesh."""
    if not divisible():
        return ()
    return tuple(axis for axis in axes_of(logical) if devices_along((axis,)) > 1)


def devices_along(axes: tuple[str, ...]) -> int:
    """How many devices of the current mesh lie along some of its axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def fitting(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The mesh axes among some, in order, that a dimension of this size divides by together."""
    taken = ()
    for axis in axes:
        if size % devices_along((*taken, axis)) == 0:
            taken = (*taken, axis)
    return taken


def batch_axes(rows: int, besides: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The mesh axes that split a batch of so many rows, as far as it divides.

    Args:
      besides: axes over which it stays whole.
    """
    return fitting(tuple(axis for axis in axes_of("batch") if axis not in besides), rows)


def on_each_device(attention: Callable, *more_specs: PartitionSpec) -> Callable:
    """`attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, *more)` on each device's rows, heads and
    part of the sequence, if a mesh is current.

    The compiler cannot divide a kernel by itself; rows and heads are independent.

    Args:
      more_specs: where further arguments lie.
    """
    if not divisible():
        return attention

    def attend(q_BNTH, k_BKTH, v_BKTH, documents_BT, *more):
        batch, length = batch_axes(q_BNTH.shape[0]), axes_of("length")
        q_spec = PartitionSpec(batch, axes_of("heads"), length)
        kv_spec = PartitionSpec(batch, axes_of("kv_heads"), length)
        return jax.shard_map(
            attention,
            in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(batch, length), *more_specs),
            out_specs=q_spec,
            check_vma=False,  # kernels do not say over which axes their outputs vary
        )(q_BNTH, k_BKTH, v_BKTH, documents_BT, *more)

    return attend
