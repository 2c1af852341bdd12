"""Device meshes, and where each logical axis lies on them.

Parameters, batches, activations and caches name their axes logically (`declare` in model/layers.py,
`with_logical_constraint` in the model, decoding/placement.py); the one table below lays those names
over the mesh.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plt_jax.config import MeshConfig
from plt_jax.distributed.axes import unboxed
from plt_jax.errors import InputError

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

RULES: Rules = (
    ("batch", ("data", "fsdp", "expert")),
    ("length", "context"),
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
    # Decoding reads every weight for a few rows: weights stay where they are, split by their wide
    # sides (fused heads, feed-forward width, vocabulary), and rows travel. So what splits sequences
    # or gathers weights in training is more tensor parallelism there, and splits the cache.
    ("decode_batch", ("data", "expert")),
    ("decode_width", ("tensor", "context", "fsdp")),
    ("cache_length", ("context", "fsdp")),
)
"""Logical axis -> mesh axes."""

BETWEEN_SLICES = ("data", "fsdp")
"""Mesh axes that may cross the slow network between slices: those that communicate least."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over the given devices (default: all).

    Later axes lie on devices that are closer together. Of several TPU slices, data and then fsdp
    devices are in different ones, and all others in the same.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or slices do not divide them.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    # Of GPUs each host is a slice to JAX, but their order alone keeps later axes within hosts.
    of_slices = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if of_slices else 1
    between = divide_slices(sizes, slices)
    within = tuple(size // between[name] for name, size in sizes.items())
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(
                within, tuple(between.values()), devices, allow_split_physical_axes=True
            )
    except (NotImplementedError, ValueError) as error:  # JAX's two ways to say so
        raise InputError(
            f"mesh: axes {sizes} cannot be laid over the {len(devices)} devices' network: "
            f"{' '.join(str(error).split())}; change the sizes"
        ) from error
    # Linen's logical partitioning needs Auto axes; the default is Explicit.
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The axis sizes of a mesh over so many devices, with -1 resolved.

    Raises:
      InputError: they do not multiply to the number of devices.
    """
    sizes = config.sizes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = next((name for name, size in sizes.items() if size == -1), None)
    if free is not None:
        if devices % fixed:
            axes = " x ".join(f"mesh.{name} {size}" for name, size in sizes.items() if size > 1)
            raise InputError(
                f"{devices} devices do not divide by {axes} = {fixed}, so mesh.{free} = -1 has no "
                "size; change the other axes"
            )
        sizes[free] = devices // fixed
    elif fixed != devices:
        raise InputError(
            f"mesh: axes {sizes} need {fixed} devices, but there are {devices}; "
            "change a size, or set one axis to -1"
        )
    return sizes


def divide_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Along how many slices each axis of a mesh lies.

    Raises:
      InputError: the axes that may cross slices do not divide by their number.
    """
    between, left = dict.fromkeys(sizes, 1), slices
    for axis in BETWEEN_SLICES:
        between[axis] = math.gcd(sizes[axis], left)
        left //= between[axis]
    if left > 1:
        crossing = " and ".join(f"{axis} = {sizes[axis]}" for axis in BETWEEN_SLICES)
        raise InputError(
            f"mesh: the devices are in {slices} slices, over which only {crossing} may lie, and "
            "they do not divide by it; make one of them a multiple"
        )
    return between


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes a mesh and the rules current, for tracing code with logical constraints."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings_of(abstract: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings of a tree of abstract arrays boxed with logical axes; unboxed leaves: replicated.

    Raises:
      InputError: a dimension does not divide by the mesh axes laid over it, or one mesh axis lies
        over two dimensions of an array; names what and where.
    """

    def sharding(path, leaf, names: PartitionSpec) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        specs, taken = [], {}
        for size, name in zip(leaf.shape, names, strict=False):
            axes = mesh_axes(name, rules)
            for axis in axes:
                if axis in taken:
                    raise InputError(
                        f"{where} has two dimensions, {taken[axis]} and {name}, over mesh axis "
                        f"{axis}; change the table of rules"
                    )
                taken[axis] = name
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                raise InputError(
                    f"{where} has a dimension of {size}, which does not divide by mesh axis "
                    f"{'x'.join(axes)} = {parts}; change the model's size or the mesh"
                )
            specs.append(axes if len(axes) > 1 else axes[0] if axes else None)
        return NamedSharding(mesh, PartitionSpec(*specs))

    names = nn.get_partition_spec(abstract)
    return jax.tree_util.tree_map_with_path(sharding, unboxed(abstract), names)


def mesh_axes(name: str | None, rules: Rules = RULES) -> tuple[str, ...]:
    """The mesh axes that a logical axis lies over.

    Raises:
      KeyError: the table has no such name.
    """
    axes = None if name is None else dict(rules)[name]
    return (axes,) if isinstance(axes, str) else axes or ()


def abstract_arrays(boxed: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of abstract arrays boxed with their logical axes; unboxed."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unboxed(boxed),
        shardings_of(boxed, mesh),
    )


class BatchLayout(NamedTuple):
    """Where the arrays [B, T] of a batch lie, and what this process has to do with it."""

    sharding: NamedSharding
    batch_size: int
    """Rows B, of all processes."""
    rows: np.ndarray
    """Numbers of the rows that this process's devices hold some of, ascending; all, in one process.
    Processes along a context or tensor axis share theirs."""

    def place(self, batch: Any) -> Any:
        """Global device arrays of this process's rows [len(rows), T], host arrays."""

        def global_array(local: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, slice]) -> np.ndarray:
                first, last, _ = index[0].indices(self.batch_size)
                start = int(np.searchsorted(self.rows, first))
                return local[start : start + last - first, index[1]]

            shape = (self.batch_size, *local.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding, part)

        return jax.tree.map(global_array, batch)


def whole_batch(batch_size: int, mesh: Mesh) -> int:
    """A number of rows raised so that it divides over the devices that rows are split over."""
    devices = math.prod(mesh.shape[axis] for axis in mesh_axes("batch"))
    return -(-batch_size // devices) * devices


def batch_layout(
    mesh: Mesh, batch: tuple[str, int], length: tuple[str, int], parts: int = 1
) -> BatchLayout:
    """The layout of batches [B, T], split by rows and along the sequence.

    Args:
      batch: name and value of the configuration field that B comes from.
      length: the same of T.
      parts: how many micro-batches, each on all devices, B is taken in.

    Raises:
      InputError: one of them does not divide.
    """
    (batch_name, B), (length_name, T) = batch, length
    row_axes, length_axes = mesh_axes("batch"), mesh_axes("length")
    for name, size, axes in (
        (batch_name + (f" / {parts} micro-batches" if parts > 1 else ""), B // parts, row_axes),
        (length_name, T, length_axes),
    ):
        devices = math.prod(mesh.shape[axis] for axis in axes)
        if size % devices:
            raise InputError(
                f"{name} = {size} does not divide by the {devices} devices of mesh axes "
                f"{' x '.join(axes)}; change either"
            )
    sharding = NamedSharding(mesh, PartitionSpec(row_axes, length_axes))
    rows = np.zeros(B, bool)
    for index in sharding.addressable_devices_indices_map((B, T)).values():
        rows[index[0]] = True
    return BatchLayout(sharding, B, np.flatnonzero(rows))
