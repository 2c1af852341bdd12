"""Placement of a cache on a mesh.

Sequences are split over the mesh axes of the batch, and heads over the tensor axis. The slots of
keys and values are split over the context and fsdp axes, and over the axes that sequences or heads
do not divide by, as far as the number of slots divides. So of one long sequence every device holds
a part, and the last ones the windows. Each device attends to what it holds, and small all-reduces
merge the results (`attention.shard_map_attention`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.distributed.axes import batch_axes, current_axes, devices_along, dividing_axes


class CacheShard(NamedTuple):
    """The slots of a cache that one device holds."""

    start: jax.Array | int = 0
    """The first of them."""
    axes: tuple[str, ...] = ()
    """The mesh axes along which other devices hold the other slots."""

    def here(self, slots: jax.Array, held: int) -> jax.Array:
        """Where slots lie among the `held` ones of this device; `held` for all others."""
        if not self.axes:
            return slots
        here = slots - self.start
        return jnp.where((here >= 0) & (here < held), here, held)


class Placement(NamedTuple):
    """The mesh axes over which the dimensions of a cache lie."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    slots: tuple[str, ...]

    @property
    def stored(self) -> PartitionSpec:
        """Sharding of keys and values [B, K, slots, H]."""
        return PartitionSpec(self.batch, self.heads, self.slots)

    @property
    def rows(self) -> PartitionSpec:
        """Sharding of queries and of new keys and values [B, N or K, T, H]."""
        return PartitionSpec(self.batch, self.heads)


def placement(batch: int, kv_heads: int, slots: int) -> Placement:
    """The placement of a cache's arrays on the current mesh.

    Args:
      batch, kv_heads, slots: their number. A mesh axis that divides none of them is not used.
    """
    rows = batch_axes(batch, "decode_batch")
    heads = dividing_axes(current_axes("kv_heads"), kv_heads)
    idle = (*current_axes("decode_batch"), *current_axes("kv_heads"))
    left = [axis for axis in idle if axis not in (*rows, *heads)]
    return Placement(rows, heads, dividing_axes((*current_axes("cache_length"), *left), slots))


def slots_multiple(batch: int, kv_heads: int) -> int:
    """The number of devices that a cache's slots can be split over.

    A number of slots that is a multiple of it uses every mesh axis that may hold some.
    """
    return devices_along(placement(batch, kv_heads, slots=0).slots)  # zero divides by all
