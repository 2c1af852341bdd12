"""Specifications of accelerators: peak arithmetic, memory and links, each with its source.

Sources: [G] Google Cloud's page of each TPU (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e,
/tpu7x), [S] How to Scale Your Model (jax-ml.github.io/scaling-book/tpus, table "TPU specs"). Those
of GPUs are in gpus.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from plt_jax.distributed.gpus import GPUS
from plt_jax.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU chip. All speeds are per chip, even if a chip is two JAX devices."""

    name: str
    flops: float
    """Peak bfloat16 FLOP/s; a multiplication with an addition counts as two."""
    hbm_bytes: float
    """Bytes of memory that programs may use."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s of one inter-chip link (ICI) in one direction."""
    network_bandwidth: float
    """Bytes/s out of one chip into the data-center network (DCN), which joins slices."""
    devices: int
    """Number of JAX devices of a chip."""
    dimensions: int
    """Number of dimensions of the torus; a chip has two links along each."""
    most_chips: int
    """Largest number of chips in one slice."""
    shapes: tuple[str, ...]
    """Shapes of slices; for three-dimensional slices, the shapes below 4x4x4."""

    def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Whether a slice is a ring along each of its dimensions.

        In two dimensions it is one along a dimension that spans the pod; in three dimensions, if
        the slice consists of whole 4x4x4 cubes ([S]).
        """
        if self.dimensions == 2:
            return tuple(size == 16 for size in shape)
        return (all(size % 4 == 0 for size in shape),) * 3


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BELOW_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            flops=197e12,  # [G], [S]
            hbm_bytes=16 * GIB,  # [G] 16 GB; libtpu's compiler allows 15.75 GiB
            hbm_bandwidth=819e9,  # [G]
            link_bandwidth=45e9,  # [S]; [G] has 400 GB/s for 4 links, both directions
            network_bandwidth=3.125e9,  # [S]; [G] has 6.4 Tb/s for 256 chips
            devices=1,
            dimensions=2,
            most_chips=256,
            shapes=_PLANE,
        ),
        Chip(
            "v5p",
            flops=459e12,  # [G], [S]
            hbm_bytes=95 * GIB,  # [G]; 96 of which a part is reserved
            hbm_bandwidth=2765e9,  # [G]
            link_bandwidth=90e9,  # [S]; [G] has 1200 GB/s for 6 links, both directions
            network_bandwidth=6.25e9,  # [G] 50 Gb/s, [S]
            devices=1,
            dimensions=3,
            most_chips=6144,  # [G], the largest that can be scheduled
            shapes=_BELOW_CUBE,
        ),
        Chip(
            "v6e",
            flops=918e12,  # [G]; [S] has 920
            hbm_bytes=32 * GIB,  # [G] 32 GB
            hbm_bandwidth=1638e9,  # [G]
            link_bandwidth=90e9,  # [S]; [G] has 800 GB/s for 4 links, both directions
            network_bandwidth=12.5e9,  # [G] 100 Gb/s, [S]
            devices=1,
            dimensions=2,
            most_chips=256,
            shapes=_PLANE,
        ),
        Chip(
            "tpu7x",
            flops=2307e12,  # [G]
            hbm_bytes=192 * GIB,  # [G]
            hbm_bandwidth=7380e9,  # [G]
            link_bandwidth=90e9,  # [S]; [G] has 1200 GB/s for 6 links, both directions
            network_bandwidth=12.5e9,  # [G] 100 Gb/s, [S]
            devices=2,  # [G], "dual-chiplet architecture"
            dimensions=3,
            most_chips=9216,  # [G]
            shapes=_BELOW_CUBE,
        ),
    )
}

_TPU_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one JAX device by its `device_kind`; None if unknown."""
    if device_kind in _TPU_KINDS:
        chip = CHIPS[_TPU_KINDS[device_kind]]
        return chip.flops / chip.devices
    if "PCIe" in device_kind and "H100" in device_kind:
        return 756e12  # NVIDIA's data sheet
    cards = (gpu.flops for gpu in GPUS.values() if gpu.name.upper() in device_kind)
    return next(cards, None)


@dataclass(frozen=True)
class Topology:
    """Slices of one kind of chip and of one shape."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips of one slice along each dimension of its torus."""
    slices: int = 1

    @property
    def name(self) -> str:
        """The name that libtpu expects."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Number of JAX devices of all slices."""
        return self.chips * self.chip.devices


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads CHIP:SHAPE, such as v5e:4x4 or v5p:4x4x8.

    Raises:
      InputError: the text has another form, the chip is unknown, or has no slices of this shape.
    """
    if slices < 1:
        raise InputError(f"--slices is {slices}; it must be at least 1")
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", text)
    if match is None:
        raise InputError(
            f"--topology is {text}; it must have the form CHIP:SHAPE, such as v5e:4x4 or v5p:4x4x8 "
            f"(chips: {', '.join(CHIPS)})"
        )
    chip = CHIPS.get(match[1])
    if chip is None:
        raise InputError(f"--topology {text}: unknown chip {match[1]}; known: {', '.join(CHIPS)}")
    shape = tuple(int(size) for size in match[2].split("x"))
    cubes = chip.dimensions == 3 and len(shape) == 3 and list(shape) == sorted(shape)
    cubes = cubes and all(size and size % 4 == 0 for size in shape)
    if match[2] not in chip.shapes and not (cubes and math.prod(shape) <= chip.most_chips):
        known = ", ".join(chip.shapes)
        if chip.dimensions == 3:
            known += (
                ", and AxBxC with multiples of 4 in ascending order, "
                f"up to {chip.most_chips} chips, such as 4x4x8"
            )
        raise InputError(f"--topology {text}: {chip.name} has slices of {known}")
    return Topology(chip, shape, slices)
