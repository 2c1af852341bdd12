"""How many bytes of arrays a process reads or writes at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

CONCURRENT_BYTES = 2**26
"""The most bytes that a process reads or writes at a time, unless that is less than a sixteenth of
what it holds, or than what has to be read at once."""


def _shard_shape(leaf: Any) -> tuple[int, ...]:
    sharding = leaf.sharding
    return tuple(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))


def bytes_read(stored: Any, wanted: Any) -> int:
    """The bytes, in the wanted dtype, of the stored pieces that a shard of an array may overlap.

    Where it overlaps pieces that are not all its own, those of all shards on this process's devices
    are read at once: a piece would be read again for a shard that is read later.
    """
    pieces = stored.storage_metadata.chunk_shape or stored.shape
    shard, count = _shard_shape(wanted), 1
    for size, part, piece in zip(stored.shape, shard, pieces, strict=True):
        overlaps = [
            math.ceil((start + part) / piece) - start // piece
            for start in range(0, size, max(part, 1))
        ]
        count *= piece * max(overlaps, default=1)
    itemsize = max(np.dtype(leaf.dtype).itemsize for leaf in (stored, wanted))
    return itemsize * count * (_shards_held(wanted) if count > math.prod(shard) else 1)


def _shards_held(leaf: Any) -> int:
    """The number of different shards of an array on this process's devices."""
    if leaf.sharding is None:
        return 1
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return len({str(place) for place in places})


def shard_bytes(leaf: Any) -> int:
    """Bytes of a shard of an array."""
    return np.dtype(leaf.dtype).itemsize * math.prod(_shard_shape(leaf))


def byte_limit(arrays: Iterable[Any], sizes: Iterable[int]) -> int:
    """The bytes that may be read or written at a time.

    Args:
      arrays: what this process reads or writes, with shardings or on one device.
      sizes: the bytes that must fit at once; orbax refuses a shard that reaches the limit.
    """
    held = sum(shard_bytes(leaf) * _shards_held(leaf) for leaf in arrays)
    return max(CONCURRENT_BYTES, held // 16, *(size + 1 for size in sizes))
