"""Arrays that lie on the devices of several processes, brought to process 0 part by part."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def gather_part(array: jax.Array | np.ndarray, index: tuple[int, ...] = ()) -> np.ndarray:
    """`array[index]` on the host of process 0; all processes must call it.

    What is sent at a time is one device's shard of each process, so that a host needs little memory
    beside the part.

    Args:
      array: an array of any sharding.
      index: positions along the first axes, of which a shard may have some or all.

    Returns:
      The part. In processes other than the first it is not defined, unless they hold all of it.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array[index])
    is_first = jax.process_index() == 0
    whole = np.empty(array.shape[len(index) :] if is_first else 0, array.dtype)
    owned = _owned_places(array, index)
    here = {_place(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    mesh = _one_device_each(array)
    nothing = np.zeros(array.sharding.shard_shape(array.shape)[len(index) :], array.dtype)
    for turn in range(max(map(len, owned))):
        sent = nothing
        for place in owned[jax.process_index()][turn : turn + 1]:
            starts = (start for start, _ in place)
            at = tuple(position - start for position, start in zip(index, starts, strict=False))
            sent = np.asarray(here[place][at])
        shards = _exchange(sent, mesh)
        for places, shard in zip(owned, shards if is_first else (), strict=False):
            for place in places[turn : turn + 1]:
                whole[tuple(slice(*along) for along in place[len(index) :])] = shard
    return whole


Place = tuple[tuple[int, int], ...]
"""The first position of a shard along each axis of its array, and the one behind its last."""


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> Place:
    return tuple(along.indices(size)[:2] for along, size in zip(index, shape, strict=True))


def _owned_places(array: jax.Array, index: tuple[int, ...]) -> list[list[Place]]:
    """The shards of each process that hold some of `array[index]`; of what several processes hold,
    the first of them gives it."""
    owned: list[list[Place]] = [[] for _ in range(jax.process_count())]
    taken = set()
    places = array.sharding.devices_indices_map(array.shape)
    for device, slices in sorted(places.items(), key=lambda entry: entry[0].process_index):
        place = _place(slices, array.shape)
        held = (
            start <= position < stop for position, (start, stop) in zip(index, place, strict=False)
        )
        if place not in taken and all(held):
            taken.add(place)
            owned[device.process_index].append(place)
    return owned


def _one_device_each(array: jax.Array) -> Mesh:
    """A mesh of one device of each process."""
    devices: dict[int, Any] = {}
    for device in sorted(array.sharding.device_set, key=lambda device: device.id):
        devices.setdefault(device.process_index, device)
    return Mesh(np.array([devices[index] for index in sorted(devices)]), ("process",))


def _exchange(shard: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The shards of all processes, [P, ...]."""
    device = next(one for one in mesh.devices.flat if one.process_index == jax.process_index())
    local = jax.device_put(shard[None], device)
    spread = jax.make_array_from_single_device_arrays(
        (mesh.size, *shard.shape), NamedSharding(mesh, PartitionSpec("process")), [local]
    )
    gathered = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(spread)
    return np.asarray(gathered.addressable_data(0))


def _same(array: jax.Array) -> jax.Array:
    return array
