"""Where logical axes lie on the current mesh, for code that runs on each device by itself."""

from __future__ import annotations

import math

import flax.linen as nn
import jax


def axes_of(logical: str) -> tuple[str, ...]:
    """The mesh axes over which a logical axis lies."""
    axes = nn.logical_to_mesh_axes((logical,))[0]
    return (axes,) if isinstance(axes, str) else axes or ()


def devices_along(axes: tuple[str, ...]) -> int:
    """How many devices of the current mesh lie along some of its axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def batch_axes(rows: int, besides: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The mesh axes that split a batch of so many rows: none where it does not divide.

    Args:
      besides: axes over which it stays whole.
    """
    axes = tuple(axis for axis in axes_of("batch") if axis not in besides)
    return () if rows % devices_along(axes) else axes
