"""Times of collectives by ring formulas, and a step's bounds."""

import itertools

import pytest

from plt_jax.compile.collectives import Collective
from plt_jax.compile.roofline import (
    Ring,
    dcn_seconds,
    ici_seconds,
    permutation_seconds,
    route,
    step_times,
)
from plt_jax.distributed.chips import CHIPS, parse_topology

V5P, V5E = CHIPS["v5p"], CHIPS["v5e"]
CUBE = parse_topology("v5p:4x4x4")
GB = 10**9


def line(axis: int, chips: range) -> list[tuple[int, ...]]:
    return [tuple(i if axis == dim else 0 for dim in range(3)) for i in chips]


def test_a_whole_dimension_of_a_cube_is_a_ring_and_a_part_is_a_line():
    assert route(line(1, range(4)), CUBE).rings == (Ring(4, 2, 1),)
    assert route(line(1, range(2)), CUBE).rings == (Ring(2, 1, 1),)
    assert route(line(2, range(0, 4, 2)), CUBE).rings == (Ring(2, 1, 2),)


def test_a_group_of_all_spans_every_dimension():
    where = route(list(itertools.product(range(4), repeat=3)), CUBE)
    assert (where.rings, where.chips, where.devices) == ((Ring(4, 2, 1),) * 3, 64, 64)


@pytest.mark.parametrize(
    ("kind", "share"),
    [("all-gather", 3 / 4), ("reduce-scatter", 3 / 4), ("all-reduce", 6 / 4)],
)
def test_gathers_and_reductions_on_a_ring(kind, share):
    where = route(line(0, range(4)), CUBE)
    assert ici_seconds(kind, GB, where, V5P) == pytest.approx(share * GB / (2 * 90e9))


def test_three_rings_gather_three_times_as_fast():
    where = route(list(itertools.product(range(4), repeat=3)), CUBE)
    assert ici_seconds("all-gather", GB, where, V5P) == pytest.approx(63 / 64 * GB / (6 * 90e9))


def test_all_to_all_is_bounded_by_the_middle_of_a_ring_or_line():
    """A quarter of a gather's time on a ring, as the scaling book has it; a line takes twice."""
    pod = parse_topology("v5e:16x16")
    ring = route([(i, 0) for i in range(16)], pod)
    gather = ici_seconds("all-gather", 16 * GB, ring, V5E) * 16 / 15
    assert ici_seconds("all-to-all", GB, ring, V5E) == pytest.approx(gather / 4)
    small = route([(i, 0) for i in range(4)], parse_topology("v5e:4x4"))
    assert ici_seconds("all-to-all", GB, small, V5E) == pytest.approx(GB * 4 / 4 / 45e9)


def test_the_two_devices_of_a_chip_share_its_links():
    topology, chip = parse_topology("tpu7x:4x4x4"), CHIPS["tpu7x"]
    ring = [(i, 0, 0) for i in range(4)]
    both = ici_seconds("all-gather", GB, route(ring * 2, topology), chip)
    one_each = ici_seconds("all-gather", GB, route(ring, topology), chip)
    assert both == pytest.approx(3 / 4 * GB / (2 * 90e9))
    assert one_each == pytest.approx(2 * both)
    within = ici_seconds("all-gather", GB, route([(0, 0, 0)] * 2, topology), chip)
    assert within == pytest.approx(GB / 2 / (6 * 90e9))


class Device:
    def __init__(self, *coords: int):
        self.coords = coords


def test_opposite_permutations_use_different_links():
    devices = [Device(i, 0, 0) for i in range(4)]
    forward, backward = ([(i, (i + step) % 4) for i in range(4)] for step in (1, 3))

    def permutation(pairs):
        return Collective("collective-permute", (0, 1, 2, 3), 1, 1, GB, pairs=tuple(pairs))

    one, same = permutation(forward), permutation(forward)
    assert permutation_seconds([one], devices, CUBE) == pytest.approx([GB / 90e9])
    assert sum(permutation_seconds([one, same], devices, CUBE)) == pytest.approx(2 * GB / 90e9)
    both = permutation_seconds([one, permutation(backward)], devices, CUBE)
    assert both == pytest.approx([GB / 2 / 90e9] * 2)


def test_what_chips_pass_on_loads_their_links_too():
    """Four chips in a line of eight, each sending two on: the middle links carry two parts."""
    devices = [Device(0, 0, i) for i in range(8)]
    pairs = tuple((i, i + 2) for i in range(4))
    apart = Collective("collective-permute", (0, 2), 1, 1, GB, pairs=pairs)
    topology = parse_topology("v5p:4x4x8")
    assert permutation_seconds([apart], devices, topology) == pytest.approx([2 * GB / 90e9])


def test_a_permutation_within_chips_does_not_touch_the_torus():
    together = Collective("collective-permute", (0, 1), 1, 1, GB, pairs=((0, 1), (1, 0)))
    devices = [Device(0, 0, 0), Device(0, 0, 0)]
    topology = parse_topology("tpu7x:4x4x4")
    assert permutation_seconds([together], devices, topology) == pytest.approx([GB / 6 / 90e9])


def test_between_slices_a_reduction_goes_both_ways():
    assert dcn_seconds("all-reduce", GB, 4, V5P) == pytest.approx(2 * 3 / 4 * GB / 6.25e9)
    assert dcn_seconds("all-gather", GB, 4, V5P) == pytest.approx(3 * GB / 6.25e9)


def test_a_step_takes_between_the_largest_and_the_sum():
    def collective(**settings):
        return Collective("all-reduce", (0, 1), **{"slices": 1, "count": 1, "bytes": 8, **settings})

    seconds = [
        (collective(), 0.25),
        (collective(slices=2), 0.125),
        (collective(certain=False), 9.0),
    ]
    times = step_times(459e12, 2765e9 / 2, seconds, V5P)
    assert times == pytest.approx((1.0, 0.5, 0.25, 0.125))
    assert (times.fastest, times.slowest) == pytest.approx((1.0, 1.875))


def test_a_device_of_two_on_a_chip_has_half_of_its_arithmetic_and_memory():
    times = step_times(2307e12, 7380e9, [], CHIPS["tpu7x"])
    assert times == pytest.approx((2.0, 2.0, 0.0, 0.0))
