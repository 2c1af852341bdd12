"""Chips and topologies: names, shapes, refusals, rings."""

import pytest

from plt_jax.distributed.chips import CHIPS, parse_topology, peak_flops
from plt_jax.errors import InputError


def test_a_topology_counts_chips_and_devices_of_all_slices():
    topology = parse_topology("v5p:4x4x8", slices=3)
    assert (topology.name, topology.chips, topology.devices) == ("v5p:4x4x8", 384, 384)


def test_a_tpu7x_chip_is_two_devices():
    topology = parse_topology("tpu7x:4x4x4")
    assert (topology.chips, topology.devices) == (64, 128)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5p", "form CHIP:SHAPE"),
        ("v5p:64", "v5p has slices of 2x2x1"),
        ("v5p:4x4", "v5p has slices of 2x2x1"),
        ("v5p:4x4x6", "multiples of 4"),
        ("v5p:8x4x4", "ascending"),
        ("v5p:0x4x4", "multiples of 4"),
        ("v5p:32x32x32", "up to 6144 chips"),
        ("v5e:3x3", "v5e has slices of 1x1, 2x2"),
        ("v5e:32x32", "8x16, 16x16"),
        ("v9:4x4", "known: v5e, v5p, v6e, tpu7x"),
        ("v5p:4x4x4\n", "form CHIP:SHAPE"),
    ],
)
def test_unknown_chips_and_shapes_are_refused_in_one_line(text, says):
    with pytest.raises(InputError, match=says) as refused:
        parse_topology(text)
    assert "\n" not in str(refused.value)


def test_no_slices_are_refused():
    with pytest.raises(InputError, match="--slices is 0"):
        parse_topology("v5e:4x4", slices=0)


@pytest.mark.parametrize(
    ("chip", "shape", "wraps"),
    [
        ("v5e", (16, 16), (True, True)),
        ("v5e", (8, 16), (False, True)),
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
    ],
)
def test_rings_are_whole_pods_or_whole_cubes(chip, shape, wraps):
    assert CHIPS[chip].wraps(shape) == wraps


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
    ],
)
def test_peak_of_a_device_by_its_kind(kind, flops):
    assert peak_flops(kind) == flops
