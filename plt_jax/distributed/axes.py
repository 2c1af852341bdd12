"""Where logical axes lie on the current mesh, for code that runs on each device by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec


def unboxed(tree: Any) -> Any:
    """A tree without the boxes that hold logical axes; unlike `nn.unbox`, of abstract arrays under
    a mesh too."""

    def unbox(leaf: Any) -> Any:
        boxed = isinstance(leaf, nn.meta.AxisMetadata)
        return leaf.unbox(apply_constraint=False) if boxed else leaf

    return jax.tree.map(unbox, tree, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))


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
    """The mesh axes among some, of several devices each, that a dimension of this size divides by
    together; in order."""
    taken = ()
    for axis in axes:
        several = devices_along((axis,)) > 1
        if several and size % devices_along((*taken, axis)) == 0:
            taken = (*taken, axis)
    return taken


def batch_axes(rows: int, logical: str = "batch") -> tuple[str, ...]:
    """The mesh axes that split a batch of so many rows, as far as it divides.

    Args:
      logical: "batch" in training, "decode_batch" in decoding.
    """
    return fitting(axes_of(logical), rows)


def lay(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """The array laid over mesh axes by dimension, if a mesh is current; without any, whole on each
    device."""
    if not divisible():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


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
