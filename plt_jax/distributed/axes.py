"""Logical axes on the current mesh, for code that is mapped over its devices.

The current mesh and rules are those of `use_mesh` (mesh.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AxisType, PartitionSpec


def unboxed(tree: Any) -> Any:
    """A tree without Flax's boxes, which hold the logical axes of its leaves.

    `nn.unbox` would constrain the leaves to the current mesh, which abstract arrays cannot be.
    """

    def unbox(leaf: Any) -> Any:
        boxed = isinstance(leaf, nn.LogicallyPartitioned)
        return leaf.unbox(apply_constraint=False) if boxed else leaf

    return jax.tree.map(unbox, tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def mesh_is_active() -> bool:
    """Whether there is a current mesh of several devices, and this code is not inside a shard_map
    over it, where each device already works on its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types


def current_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is sharded over by the current rules; () without rules."""
    axes = logical_to_mesh_axes((logical,))
    axis = None if axes is None else axes[0]
    return (axis,) if isinstance(axis, str) else axis or ()


def sharded_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes of `current_axes` along which there are several devices; () without a mesh."""
    if not mesh_is_active():
        return ()
    return tuple(axis for axis in current_axes(logical) if devices_along((axis,)) > 1)


def devices_along(axes: tuple[str, ...]) -> int:
    """Number of devices of the current mesh along some of its axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def dividing_axes(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The first of the given mesh axes over which a dimension of this size can be sharded.

    Axes of one device are left out, and so is each axis by which, together with those taken before
    it, the size does not divide.
    """
    taken: tuple[str, ...] = ()
    for axis in axes:
        several = devices_along((axis,)) > 1
        if several and size % devices_along((*taken, axis)) == 0:
            taken = (*taken, axis)
    return taken


def batch_axes(rows: int, logical: str = "batch") -> tuple[str, ...]:
    """The mesh axes over which a batch of so many rows can be sharded.

    Args:
      rows: number of sequences.
      logical: "batch" in training, "decode_batch" in decoding.
    """
    return dividing_axes(current_axes(logical), rows)


def shard(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """The array, constrained to a sharding where a mesh is active.

    Args:
      x: any array.
      spec: the mesh axes of each dimension, as in a PartitionSpec; none replicates the array.
    """
    if not mesh_is_active():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def on_each_device(attention: Callable, *more_specs: PartitionSpec) -> Callable:
    """Maps an attention function over the devices of the mesh, if one is active.

    The compiler cannot shard a kernel by itself. Each device gets its rows, its heads and its part
    of the sequence; rows and heads are independent.

    Args:
      attention: `attention(q_BNTH, k_BKTH, v_BKTH, documents_BT, *more) -> out_BNTH`.
      more_specs: the shardings of the further arguments.
    """
    if not mesh_is_active():
        return attention

    def attend(q_BNTH, k_BKTH, v_BKTH, documents_BT, *more):
        batch, length = batch_axes(q_BNTH.shape[0]), current_axes("length")
        q_spec = PartitionSpec(batch, current_axes("heads"), length)
        kv_spec = PartitionSpec(batch, current_axes("kv_heads"), length)
        return jax.shard_map(
            attention,
            in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(batch, length), *more_specs),
            out_specs=q_spec,
            check_vma=False,  # kernels do not say over which axes their outputs vary
        )(q_BNTH, k_BKTH, v_BKTH, documents_BT, *more)

    return attend
