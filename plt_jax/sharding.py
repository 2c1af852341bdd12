"""Device meshes, and where each logical axis lies on them.

Parameters and activations name their axes logically (`declare` in model/layers.py,
`with_logical_constraint` in the model); the one table below lays those names over the mesh.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plt_jax.config import MeshConfig
from plt_jax.errors import InputError

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp", "expert")),
    ("length", None),
    ("activation", None),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head", None),
    ("ffn", "tensor"),
    ("expert", "expert"),
    ("loops", None),
    ("layers", None),
)
"""Logical axis -> mesh axes."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over the given devices (default: all).

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = next((name for name, size in sizes.items() if size == -1), None)
    if free is not None:
        if len(devices) % fixed:
            raise InputError(
                f"mesh: {len(devices)} devices do not divide by the fixed axes' product {fixed}, "
                f"so mesh.{free} = -1 has no size; change the other axes"
            )
        sizes[free] = len(devices) // fixed
    elif fixed != len(devices):
        raise InputError(
            f"mesh: axes {sizes} need {fixed} devices, but there are {len(devices)}; "
            "change a size, or set one axis to -1"
        )
    # Linen's logical partitioning needs Auto axes; make_mesh's default is Explicit.
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes a mesh and the rules current, for tracing code with logical constraints."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings_of(abstract: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of abstract arrays boxed with logical axes; unboxed leaves: replicated.

    Raises:
      InputError: a dimension does not divide by the mesh axes laid over it; names both.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(abstract), RULES)
    shapes = nn.unbox(abstract)

    def check(path, leaf, spec: PartitionSpec) -> NamedSharding:
        for size, axes in zip(leaf.shape, spec, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise InputError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')} has a dimension of "
                    f"{size}, which does not divide by mesh axis {'x'.join(names)} = {parts}; "
                    "change the model's size or the mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(check, shapes, specs)


def abstract_arrays(boxed: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of abstract arrays boxed with their logical axes; unboxed."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings_of(boxed, mesh),
    )


def batch_sharding(mesh: Mesh, batch_size: int, field: str) -> NamedSharding:
    """The sharding of arrays [B, ...], split by rows over the axes of the batch.

    Raises:
      InputError: `batch_size`, the value of the configuration field named, does not divide.
    """
    spec = nn.logical_to_mesh_axes(("batch",), RULES)
    rows = math.prod(mesh.shape[axis] for axis in spec[0])
    if batch_size % rows:
        raise InputError(
            f"{field} = {batch_size} does not divide by the {rows} devices of mesh axes "
            f"{' x '.join(spec[0])}; change either"
        )
    return NamedSharding(mesh, spec)


def place_batch(batch: Any, sharding: NamedSharding) -> Any:
    """This process's rows of a global batch of host arrays, as global device arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
