"""Where a cache lies on a mesh.

Sequences are split over the batch's axes, heads over the tensor axis, and the positions of the
cache that grows over the context and fsdp axes, and over those that sequences or heads do not
divide by, as far as their number divides: of one long sequence every device holds a part. Each
attends to what it holds, and small sums put the parts together (`attention.attend_where_held`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.distributed.axes import batch_axes, current_axes, dividing_axes


class Part(NamedTuple):
    """What a device holds of the positions of a cache."""

    start: jax.Array | int = 0
    """Its first position."""
    axes: tuple[str, ...] = ()
    """The mesh axes along which others hold the rest."""

    def slots(self, positions: jax.Array, capacity: int) -> jax.Array:
        """Where positions lie among the `capacity` held; `capacity`, for those that do not."""
        here = positions - self.start
        return jnp.where((here >= 0) & (here < capacity), here, capacity)


class Placement(NamedTuple):
    """The mesh axes over which the dimensions of a cache lie."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    positions: tuple[str, ...]

    @property
    def full(self) -> PartitionSpec:
        """Of keys and values [B, K, S, H]."""
        return PartitionSpec(self.batch, self.heads, self.positions)

    @property
    def ring(self) -> PartitionSpec:
        """Of keys and values of windows [B, L-1, K, W, H]."""
        return PartitionSpec(self.batch, None, self.heads)

    @property
    def rows(self) -> PartitionSpec:
        """Of queries and new keys and values [B, N or K, T, H]."""
        return PartitionSpec(self.batch, self.heads)


def placement(batch: int, kv_heads: int, capacity: int) -> Placement:
    """The placement of a cache's arrays on the current mesh.

    Args:
      batch, kv_heads, capacity: B, K and S. An axis that none of them divides by is not used: make
        S a multiple of the devices.
    """
    rows = batch_axes(batch, "decode_batch")
    heads = dividing_axes(current_axes("kv_heads"), kv_heads)
    idle = (*current_axes("decode_batch"), *current_axes("kv_heads"))
    left = [axis for axis in idle if axis not in (*rows, *heads)]
    return Placement(rows, heads, dividing_axes((*current_axes("cache_length"), *left), capacity))
