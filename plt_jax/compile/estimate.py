"""Reads a compiled step's cost on each device: memory, collectives and time."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jax.sharding import Mesh

from plt_jax.compile.activations import Activations
from plt_jax.compile.collectives import Collective, axes_between, read_collectives
from plt_jax.compile.hlo import parse_program
from plt_jax.compile.program import Compiled
from plt_jax.compile.roofline import Times, all_seconds, step_times
from plt_jax.compile.traffic import hbm_bytes
from plt_jax.distributed.chips import Topology
from plt_jax.model.arithmetic import StepFlops


@dataclass(frozen=True)
class CollectiveTraffic:
    """The collectives of one kind over the same mesh axes, in one step on one device."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes; "slices" for the data-center network between them."""
    devices: int
    """Devices that communicate with one another; slices, for the data-center network."""
    count: int
    bytes: int
    gathered_bytes: int
    """The part of `bytes` in gathers that the program does as all-reduces."""
    seconds: float
    certain: bool
    """False in a branch of the program that a step may not run; no sum counts it."""


@dataclass(frozen=True)
class Estimate:
    """The cost of a step on each device of a topology."""

    topology: Topology
    mesh: dict[str, int]
    tokens: int
    """Tokens of one step, over all devices."""
    flops: StepFlops
    compiled: Compiled
    activations: Activations | None
    """None for a decode step."""
    collectives: tuple[CollectiveTraffic, ...]
    hbm_bytes: int
    """Bytes that one device reads from and writes to its main memory (HBM)."""
    times: Times | None
    """None if the compiler refused the program."""

    @property
    def hbm_capacity(self) -> int:
        """Bytes of HBM of one device: the compiler's figure if it gave one, else the chip's."""
        chip = self.topology.chip
        return self.compiled.memory.available or int(chip.hbm_bytes / chip.devices)

    @property
    def fits(self) -> bool:
        memory = self.compiled.memory
        return memory.refused is None and memory.needed <= self.hbm_capacity

    @property
    def dominating(self) -> str | None:
        """The resource with the largest time; of links and networks the slowest collective."""
        if self.times is None:
            return None
        by_name = self.times._asdict()
        name = max(by_name, key=by_name.__getitem__)
        if name not in ("ici", "dcn"):
            return name
        over = [one for one in self.collectives if (one.axes == ("slices",)) == (name == "dcn")]
        most = max((one for one in over if one.certain), key=lambda one: one.seconds)
        return f"{most.kind} over {' x '.join(most.axes)}"

    def mfu(self, seconds: float) -> float:
        """Model FLOP/s as a share of the chips' peak, if a step takes so many seconds."""
        return self.flops.model / seconds / (self.topology.chip.flops * self.topology.chips)

    def tokens_per_second(self, seconds: float) -> float:
        """Tokens per second of one chip, if a step takes so many seconds."""
        return self.tokens / seconds / self.topology.chips

    def as_json(self) -> dict[str, Any]:
        """The estimate in types that JSON has."""
        made: dict[str, Any] = {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "devices": self.topology.devices,
            "chip": asdict(self.topology.chip),
            "mesh": self.mesh,
            "tokens": self.tokens,
            "flops": {
                "model_by_loop": self.flops.by_loop,
                "model": self.flops.model,
                "executed": self.flops.executed,
            },
            "memory": asdict(self.compiled.memory),
            "activations": self.activations and self.activations._asdict(),
            "hbm_capacity": self.hbm_capacity,
            "fits": self.fits,
            "seconds_to": self.compiled.seconds,
            "collectives": [asdict(one) for one in self.collectives],
            "hbm_bytes": self.hbm_bytes,
            "dominating": self.dominating,
            "versions": {name: package_version(name) for name in ("jax", "jaxlib", "libtpu")},
        }
        if self.times is not None:
            bounds = {"fastest": self.times.fastest, "slowest": self.times.slowest}
            made["seconds"] = self.times._asdict() | bounds
            for name, value in (("mfu", self.mfu), ("tokens_per_second", self.tokens_per_second)):
                made[name] = {bound: value(seconds) for bound, seconds in bounds.items()}
        return made


def package_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def estimate(
    topology: Topology,
    mesh: Mesh,
    compiled: Compiled,
    flops: StepFlops,
    tokens: int,
    activations: Activations | None = None,
) -> Estimate:
    """Estimates a compiled step's cost; of a refused one only the memory is known.

    Args:
      flops: FLOPs of one step, over all devices.
      tokens: tokens of one step, over all devices.
      activations: those of a train step.
    """
    traffic, moved, times = (), 0, None
    if compiled.text is not None:
        program = parse_program(compiled.text)
        devices = list(mesh.devices.flat)
        within = [one for one in devices if getattr(one, "slice_index", 0) == 0]
        found = read_collectives(program, len(within))
        seconds = all_seconds(found, within, topology)
        moved = hbm_bytes(program)
        executed = flops.executed / topology.devices
        times = step_times(executed, moved, seconds, topology.chip)
        traffic = _by_axes(seconds, _sizes_within(mesh, devices, within))
    return Estimate(
        topology, dict(mesh.shape), tokens, flops, compiled, activations, traffic, moved, times
    )


def _sizes_within(mesh: Mesh, devices: Sequence[Any], within: Sequence[Any]) -> dict[str, int]:
    """The axis sizes of the part of a mesh that lies within one slice."""
    inside = {one.id for one in within} if len(within) < len(devices) else None
    if inside is None:
        return dict(mesh.shape)
    sizes = {}
    for index, (axis, size) in enumerate(mesh.shape.items()):
        line = mesh.devices[
            tuple(slice(None) if i == index else 0 for i in range(mesh.devices.ndim))
        ]
        sizes[axis] = min(size, sum(getattr(one, "slice_index", 0) == 0 for one in line))
    return sizes


def _by_axes(
    seconds: Sequence[tuple[Collective, float]], sizes: dict[str, int]
) -> tuple[CollectiveTraffic, ...]:
    """Sums collectives of one kind over the same mesh axes; the slowest first."""
    merged: dict[tuple, list[tuple[Collective, float]]] = {}
    for one, taken in seconds:
        axes = ("slices",) if one.slices > 1 else axes_between(one.group, sizes)
        members = one.slices if one.slices > 1 else len(one.group)
        if axes:
            merged.setdefault((one.kind, axes, members, one.certain), []).append((one, taken))
    made = [
        CollectiveTraffic(
            *(kind, axes, members),
            count=sum(one.count for one, _ in found),
            bytes=sum(one.bytes for one, _ in found),
            gathered_bytes=sum(one.gathered_bytes for one, _ in found),
            seconds=sum(taken for _, taken in found),
            certain=certain,
        )
        for (kind, axes, members, certain), found in merged.items()
    ]
    return tuple(sorted(made, key=lambda one: (not one.certain, -one.seconds)))
