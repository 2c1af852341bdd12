"""Bounds of a step's time, from its FLOPs and bytes and from the chip's published numbers.

Three resources bound a step: arithmetic, main memory, and links. If they overlapped perfectly, it
would take the largest of their times (`fastest`); if not at all, their sum (`slowest`). Neither
counts latencies or arithmetic below the peak, so a real step is slower than `fastest` and may be
slower than `slowest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from plt_jax.compile.collectives import Collective
from plt_jax.distributed.chips import Chip, Topology

ON_CHIP_LINKS = 6
"""Bandwidth between the two devices of a TPU7x chip, in links of the torus (Google Cloud's page of
TPU7x)."""


class Times(NamedTuple):
    """Seconds of one step, resource by resource."""

    compute: float
    hbm: float
    ici: float
    """Links between the chips of a slice."""
    dcn: float
    """The data-center network between slices."""

    @property
    def fastest(self) -> float:
        return max(self)

    @property
    def slowest(self) -> float:
        return sum(self)


class Ring(NamedTuple):
    """A group of devices along one dimension of a slice's torus."""

    chips: int
    """Chips of the group along the dimension."""
    links: int
    """Directions in which a chip can send: 2 if the group is a whole ring, else 1."""
    stride: int
    """Distance between neighbours of the group, in chips; as many groups share each link."""


class Route(NamedTuple):
    """The connections of a group of devices."""

    rings: tuple[Ring, ...]
    chips: int
    devices: int


def route(coordinates: Sequence[Sequence[int]], topology: Topology) -> Route:
    """The connections of devices, from their chips' coordinates in the slice."""
    places = np.asarray(coordinates)
    rings = []
    wraps = topology.chip.wraps(topology.shape)
    for axis, (size, wrap) in enumerate(zip(topology.shape, wraps, strict=True)):
        seen = np.unique(places[:, axis])
        if len(seen) > 1:
            whole = wrap and len(seen) == size
            stride = 1 if whole else max(1, int(np.ptp(seen)) // (len(seen) - 1))
            rings.append(Ring(len(seen), 2 if whole else 1, stride))
    return Route(tuple(rings), len(np.unique(places, axis=0)), len(places))


def ici_seconds(kind: str, size: int, where: Route, chip: Chip) -> float:
    """Seconds of a collective on the links of a slice.

    The formulas are those of rings, over all dimensions of the torus that the group spans at once.
    In a group of n, a device receives (n-1)/n of a gathered array, sends (n-1)/n of a scattered
    one, and does both in a reduction. In an all-to-all, each link of a dimension of n chips carries
    n/8 of what a device sends if the dimension is a ring, and n/4 if it is a line.

    Args:
      size: bytes, as in `Collective.bytes`.
    """
    if not where.rings:  # the devices of one chip
        parts = (2 if kind == "all-reduce" else 1) * (where.devices - 1)
        return size * parts / where.devices / (ON_CHIP_LINKS * chip.link_bandwidth)
    if kind in ("all-to-all", "ragged-all-to-all"):
        worst = max(ring.chips * ring.stride / (4 * ring.links) for ring in where.rings)
        return size * chip.devices * worst / chip.link_bandwidth
    # Devices of one chip share its links, and what arrives if they are in the same group.
    share = where.devices / where.chips / chip.devices
    bandwidth = share * sum(ring.links / ring.stride for ring in where.rings) * chip.link_bandwidth
    passes = 2 if kind == "all-reduce" else 1
    return passes * size * (where.chips - 1) / where.chips / bandwidth


def dcn_seconds(kind: str, size: int, slices: int, chip: Chip) -> float:
    """Seconds of a collective between slices, in which each device sends its own part."""
    moved = {
        "all-reduce": 2 * size * (slices - 1) / slices,
        "all-gather": size * (slices - 1),
    }.get(kind, size * (slices - 1) / slices)
    return moved * chip.devices / chip.network_bandwidth


def permutation_seconds(
    permutations: Sequence[Collective], devices: Sequence[Any], topology: Topology
) -> list[float]:
    """Seconds of permutations on the links of a slice.

    Data travels one dimension after another, the shorter way around rings. Permutations in opposite
    directions use different links and run at the same time. Together they take as long as the link
    that carries most; each one gets the share of that time that its bytes are of all bytes.
    """
    loads: Counter[tuple] = Counter()
    near = 0.0
    for one in permutations:
        ways = [
            list(_hops(devices[source].coords, devices[target].coords, topology))
            for source, target in one.pairs
        ]
        for way in ways:
            loads.update(dict.fromkeys(way, one.bytes))
        near += 0 if any(ways) else one.bytes / ON_CHIP_LINKS
    taken = (max(loads.values(), default=0) + near) / topology.chip.link_bandwidth
    total = sum(one.bytes for one in permutations)
    return [taken * one.bytes / total if total else 0.0 for one in permutations]


def _hops(source: Sequence[int], target: Sequence[int], topology: Topology) -> Iterator[tuple]:
    """The links from one chip to another, each as its first chip, axis and direction."""
    place = list(source)
    wraps = topology.chip.wraps(topology.shape)
    for axis, (size, wrap) in enumerate(zip(topology.shape, wraps, strict=True)):
        distance = target[axis] - place[axis]
        if wrap and abs(distance) > size / 2:
            distance -= int(np.sign(distance)) * size
        step = int(np.sign(distance))
        for _ in range(abs(distance)):
            yield (*place, axis, step)
            place[axis] = (place[axis] + step) % size


def all_seconds(
    collectives: Sequence[Collective], devices: Sequence[Any], topology: Topology
) -> list[tuple[Collective, float]]:
    """Each collective with the seconds that it takes in one step.

    Args:
      devices: the TPU devices of one slice, in mesh order.
    """
    taken = []
    for certain in (True, False):
        moved = [one for one in collectives if one.pairs and one.certain == certain]
        taken += zip(moved, permutation_seconds(moved, devices, topology), strict=True)
    others = [one for one in collectives if not one.pairs]
    return taken + [(one, _collective_seconds(one, devices, topology)) for one in others]


def _collective_seconds(one: Collective, devices: Sequence[Any], topology: Topology) -> float:
    if one.slices > 1:
        return dcn_seconds(one.kind, one.bytes, one.slices, topology.chip)
    if len(one.group) < 2:
        return 0.0
    places = [devices[index].coords[: len(topology.shape)] for index in one.group]
    return ici_seconds(one.kind, one.bytes, route(places, topology), topology.chip)


def step_times(
    flops: float,
    hbm_bytes: float,
    seconds: Sequence[tuple[Collective, float]],
    chip: Chip,
) -> Times:
    """The times of a step on one device.

    Args:
      flops: FLOPs that one device executes.
      hbm_bytes: bytes that one device moves to and from HBM.
      seconds: each collective with its seconds; those that are not certain do not count.
    """
    between = [(one.slices > 1, taken) for one, taken in seconds if one.certain]
    return Times(
        compute=flops / (chip.flops / chip.devices),
        hbm=hbm_bytes / (chip.hbm_bandwidth / chip.devices),
        ici=sum(taken for crosses, taken in between if not crosses),
        dcn=sum(taken for crosses, taken in between if crosses),
    )
