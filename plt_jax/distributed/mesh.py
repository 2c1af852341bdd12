"""Device meshes, and how logical axes are sharded over them.

Parameters, batches, activations and caches name their axes logically (`declare` in model/layers.py,
`with_logical_constraint` in the model, decoding/placement.py). The one table below maps those names
to axes of the mesh.
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
from plt_jax.distributed import processes
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
    # Decoding reads every weight for a few rows, so that weights stay where they are, sharded along
    # their wide dimensions (fused heads, feed-forward width, vocabulary), and rows are exchanged.
    # The mesh axes that shard sequences or gather weights in training are more tensor parallelism
    # in decoding, and shard the cache.
    ("decode_batch", ("data", "expert")),
    ("decode_width", ("tensor", "context", "fsdp")),
    ("cache_length", ("context", "fsdp")),
)
"""Logical axis -> mesh axes."""

BETWEEN_SLICES = ("data", "fsdp")
"""Mesh axes that may cross the slow network between TPU slices: those that communicate least."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a configuration.

    Later axes lie on devices that are closer together. With several TPU slices, the data axis and
    then the fsdp axis cross slices; all other axes stay within one.

    Args:
      devices: default all.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or do not divide over slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    # For JAX each host of GPUs is a slice, but their order alone keeps later axes within hosts.
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
    except (NotImplementedError, ValueError) as error:  # JAX raises either
        raise InputError(
            f"mesh: axes {sizes} cannot be laid over the {len(devices)} devices' network: "
            f"{' '.join(str(error).split())}; change the sizes"
        ) from error
    # Linen's logical partitioning needs Auto axes; the default is Explicit.
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The axis sizes of a mesh over a number of devices, with -1 resolved.

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
    """The number of slices that each axis of a mesh crosses.

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


def describe_devices(mesh: Mesh) -> str:
    """The devices of a mesh and its axes, for people."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    several = "" if processes.is_single() else f" in {jax.process_count()} processes"
    return f"{mesh.devices.size} {mesh.devices.flat[0].platform}{several} ({axes})"


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Makes a mesh and the rules current, for code with logical axes traced in the block; without a
    mesh the block runs on one device."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings_of(abstract: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The shardings of abstract arrays.

    Args:
      abstract: a tree of abstract arrays, boxed with logical axes; leaves without a box are
        replicated.

    Raises:
      InputError: a dimension does not divide by its mesh axes, or two dimensions of an array have
        the same mesh axis; the message names the array.
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
    """The mesh axes that a logical axis is sharded over; () for none.

    Raises:
      KeyError: the table has no such name.
    """
    axes = None if name is None else dict(rules)[name]
    return (axes,) if isinstance(axes, str) else axes or ()


def abstract_arrays(boxed: Any, mesh: Mesh) -> Any:
    """Abstract arrays with their shardings, from ones that are boxed with their logical axes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unboxed(boxed),
        shardings_of(boxed, mesh),
    )


class BatchLayout(NamedTuple):
    """How the arrays [B, T] of a batch are sharded, and which of its rows this process reads."""

    sharding: NamedSharding
    batch_size: int
    """Number of rows B, over all processes."""
    rows: np.ndarray
    """Indices of the rows of which this process's devices hold at least a part, ascending.

    A single process has all rows. Processes along a context or tensor axis have the same rows.
    """

    def place(self, batch: Any) -> Any:
        """The batch as global device arrays [B, T].

        Args:
          batch: a tree of host arrays [len(rows), T], this process's rows.
        """

        def global_array(local: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                first, last, _ = index[0].indices(self.batch_size)
                start = int(np.searchsorted(self.rows, first))
                return local[start : start + last - first, index[1]]

            shape = (self.batch_size, *local.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding, shard)

        return jax.tree.map(global_array, batch)

    def place_whole(self, batch: Any) -> Any:
        """As `place`, of host arrays [B, T] that have the rows of all processes."""
        return self.place(jax.tree.map(lambda array_BT: array_BT[self.rows], batch))


def whole_batch(batch_size: int, mesh: Mesh) -> int:
    """A number of rows, raised to a multiple of the devices that rows are sharded over."""
    devices = math.prod(mesh.shape[axis] for axis in mesh_axes("batch"))
    return -(-batch_size // devices) * devices


def batch_layout(
    mesh: Mesh, batch: tuple[str, int], length: tuple[str, int], parts: int = 1
) -> BatchLayout:
    """The layout of batches [B, T], sharded over rows and along the sequence.

    Args:
      batch: name and value of the configuration field that gives B.
      length: name and value of the field that gives T.
      parts: number of micro-batches of a batch, each of which is sharded over all devices.

    Raises:
      InputError: B or T does not divide over the mesh.
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
        if index is not None:
            rows[index[0]] = True
    return BatchLayout(sharding, B, np.flatnonzero(rows))
