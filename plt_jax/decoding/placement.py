"""Placement of a cache on a mesh.

Sequences are split over the mesh axes of the batch, and heads over the tensor axis. The positions
of the full cache are split over the context and fsdp axes, and over the axes that sequences or
heads do not divide by, as far as the number of positions divides. So of one long sequence every
device holds a part. Each device attends to what it holds, and small all-reduces merge the results
(`attention.shard_map_attention`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.distributed.axes import batch_axes, current_axes, dividing_axes


class CacheShard(NamedTuple):
    """The positions of a cache that one device holds."""

    start: jax.Array | int = 0
    """The first of them."""
    axes: tuple[str, ...] = ()
    """The mesh axes along which other devices hold the other positions."""

    def slots(self, positions: jax.Array, capacity: int) -> jax.Array:
        """The slots of positions among the `capacity` held here; `capacity` for all others."""
        here = positions - self.start
        return jnp.where((here >= 0) & (here < capacity), here, capacity)


class Placement(NamedTuple):
    """The mesh axes over which the dimensions of a cache lie."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    positions: tuple[str, ...]

    @property
    def full(self) -> PartitionSpec:
        """Sharding of keys and values [B, K, S, H]."""
        return PartitionSpec(self.batch, self.heads, self.positions)

    @property
    def ring(self) -> PartitionSpec:
        """Sharding of the rings' keys and values [B, L-1, K, W, H]."""
        return PartitionSpec(self.batch, None, self.heads)

    @property
    def rows(self) -> PartitionSpec:
        """Sharding of queries and of new keys and values [B, N or K, T, H]."""
        return PartitionSpec(self.batch, self.heads)


def placement(batch: int, kv_heads: int, capacity: int) -> Placement:
    """The placement of a cache's arrays on the current mesh.

    Args:
      batch, kv_heads, capacity: B, K and S. A mesh axis that divides none of them is not used; a
        capacity that is a multiple of the devices uses all.
    """
    rows = batch_axes(batch, "decode_batch")
    heads = dividing_axes(current_axes("kv_heads"), kv_heads)
    idle = (*current_axes("decode_batch"), *current_axes("kv_heads"))
    left = [axis for axis in idle if axis not in (*rows, *heads)]
    return Placement(rows, heads, dividing_axes((*current_axes("cache_length"), *left), capacity))
