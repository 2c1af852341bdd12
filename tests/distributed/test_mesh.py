"""Meshes before there are devices, and tables of rules that cannot work."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from plt_jax.config import MeshConfig
from plt_jax.distributed.mesh import (
    RULES,
    batch_layout,
    divide_slices,
    make_mesh,
    mesh_axes,
    mesh_sizes,
    shardings_of,
)
from plt_jax.errors import InputError

SIZES = {"data": 4, "fsdp": 8, "expert": 1, "context": 1, "tensor": 4}


@pytest.mark.parametrize(
    ("slices", "data", "fsdp"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 4, 2), (32, 4, 8)]
)
def test_slices_lie_along_data_first_and_then_fsdp(slices, data, fsdp):
    between = divide_slices(SIZES, slices)
    assert between == dict.fromkeys(SIZES, 1) | {"data": data, "fsdp": fsdp}


@pytest.mark.parametrize("slices", [3, 64])
def test_slices_that_the_mesh_cannot_lie_over_are_refused(slices):
    message = f"in {slices} slices, over which only data = 4 and fsdp = 8 may lie"
    with pytest.raises(InputError, match=message):
        divide_slices(SIZES, slices)


def test_one_axis_takes_the_devices_that_are_left():
    sizes = mesh_sizes(MeshConfig(data=2, fsdp=-1, tensor=4), 64)
    assert sizes == {"data": 2, "fsdp": 8, "expert": 1, "context": 1, "tensor": 4}


def test_a_mesh_axis_over_two_dimensions_is_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    boxed = {"square": nn.LogicallyPartitioned(leaf, ("heads", "ffn"))}
    with pytest.raises(
        InputError, match="square has two dimensions, heads and ffn, over mesh axis tensor; change"
    ):
        shardings_of(boxed, mesh)
    rules = tuple((name, None if name == "ffn" else axes) for name, axes in RULES)
    assert shardings_of(boxed, mesh, rules)["square"].spec == PartitionSpec("tensor", None)


def test_a_logical_axis_that_no_rule_names_is_an_error():
    with pytest.raises(KeyError):
        mesh_axes("colour")


def test_one_process_has_all_rows_and_places_them():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    layout = batch_layout(mesh, ("training.batch_size", 6), ("data.sequence_length", 4))
    assert layout.rows.tolist() == list(range(6))
    tokens = np.arange(24, dtype=np.int32).reshape(6, 4)
    for place in (layout.place, layout.place_whole):
        np.testing.assert_array_equal(place({"tokens": tokens})["tokens"], tokens)


def test_slices_are_refused_by_name_before_devices_are_laid_out():
    class Chip(NamedTuple):
        slice_index: int
        platform: str = "tpu"

    devices = [Chip(index // 4) for index in range(12)]
    with pytest.raises(
        InputError, match="mesh: the devices are in 3 slices, over which only data = 1"
    ) as refused:
        make_mesh(MeshConfig(data=1, tensor=12), devices)
    assert str(refused.value).startswith("mesh: the devices")
