"""Hugging Face checkpoints to configurations and parameters.

Parameters are read one layer at a time, from the files straight into the stacked and sharded
arrays. A process reads the rows of the tensors that its devices hold some of, and never holds its
part of the model twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plt_jax.config import MeshConfig, ModelConfig
from plt_jax.distributed.mesh import make_mesh, shardings_of
from plt_jax.errors import InputError
from plt_jax.files.paths import expand, is_folder
from plt_jax.files.reading import read_json
from plt_jax.interop.config_json import CONFIG
from plt_jax.interop.config_reader import read_config
from plt_jax.interop.options import DTYPES
from plt_jax.interop.safetensors_folder import Rows, SafetensorsFolder
from plt_jax.interop.tensor_layout import Piece, copy_piece, pieces_of
from plt_jax.interop.tensors import (
    IGNORED_SUFFIX,
    Params,
    UnstackedParameter,
    is_gate,
    leaves_by_path,
    unstacked_parameters,
)
from plt_jax.model.transformer import abstract_params


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose config.json and headers have been read and checked, and whose tensors have
    not been read."""

    folder: Path
    model_type: str
    config: ModelConfig
    files: SafetensorsFolder
    parameters: list[UnstackedParameter]
    dtypes: dict[tuple[str, ...], np.dtype]
    """The dtypes of the parameters to make, by their paths."""


def open_huggingface(path: str | Path, dtype: str | None = None) -> OpenCheckpoint:
    """Reads and checks a checkpoint's config.json and the headers of its files.

    Args and raises are those of `load_huggingface`.
    """
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    folder = expand(path)
    if not is_folder(folder):
        raise InputError(f"{folder} is not a folder; give one that holds {CONFIG} and safetensors")
    values = read_json(folder / CONFIG)
    files = SafetensorsFolder(folder, IGNORED_SUFFIX)
    try:
        name, config = read_config(values, files.tensors)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    if config.layers > len(files.tensors):
        raise InputError(
            f"{folder / CONFIG} names {config.layers} layers, but there are only "
            f"{len(files.tensors)} tensors"
        )
    parameters = unstacked_parameters(config, files.tensors)
    _check_tensors(folder, config, files, parameters)
    dtypes = _leaf_dtypes(files, parameters, dtype)
    if dtypes["embedding",] == jnp.bfloat16:
        config = config.model_copy(update={"dtype": "bfloat16"})
    return OpenCheckpoint(folder, name, config, files, parameters, dtypes)


def load_params(
    checkpoint: OpenCheckpoint,
    mesh: Mesh | None = None,
    track: Callable[[Sequence[UnstackedParameter]], Iterable[UnstackedParameter]] = iter,
) -> Params:
    """Reads the parameters of a checkpoint.

    Args:
      mesh: as in `load_huggingface`.
      track: sees every parameter of every layer as it is read, for a progress bar.

    Returns:
      Parameters as `Transformer.init` gives them, unboxed.

    Raises:
      InputError: a file cannot be read, or holds a number that is not finite.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    boxed = abstract_params(checkpoint.config)
    shapes, shardings = leaves_by_path(boxed), leaves_by_path(shardings_of(boxed, mesh))
    files, dtypes = checkpoint.files, checkpoint.dtypes
    # Parameters are read file by file, so that the files are read from their beginnings to their
    # ends.
    order = sorted(
        checkpoint.parameters, key=lambda parameter: files.tensors[parameter.tensor_names[0]].file
    )
    rows = files.read_rows(
        reading.rows
        for parameter in order
        for reading in _readings(parameter, _of_layer(shardings[parameter.path], parameter))
    )
    in_place = _share_the_hosts_memory(mesh)
    params: dict[tuple[str, ...], jax.Array] = {}
    stacks: dict[tuple[str, ...], HostShards] = {}
    for parameter in track(order):
        path, sharding = parameter.path, shardings[parameter.path]
        of_layer = _of_layer(sharding, parameter)
        if parameter.layer is not None and in_place:
            if path not in stacks:
                stacks[path] = HostShards(shapes[path].shape, dtypes[path], sharding)
            read, parts = stacks[path], stacks[path].of_layer(parameter.layer)
        else:
            read = HostShards(parameter.shape, dtypes[path], of_layer)
            parts = read.parts
        for reading in _readings(parameter, of_layer):
            if not _copy(next(rows), reading, parameter, parts):
                raise InputError(_not_finite(files, parameter, dtypes[path]))
        if parameter.layer is None:
            params[path] = read.to_array()
        elif not in_place:
            part = read.to_array()
            if path not in params:
                params[path] = jnp.zeros(shapes[path].shape, part.dtype, device=sharding)
            params[path] = _layer_writer(sharding)(params[path], part, parameter.layer)
    params |= {path: read.to_array() for path, read in stacks.items()}
    return jax.block_until_ready(unflatten_dict(params))


def _share_the_hosts_memory(mesh: Mesh) -> bool:
    """Whether layers can be read straight into the stacked parameters of the devices. Otherwise the
    host holds one layer of a parameter at a time."""
    return mesh.devices.flat[0].platform == "cpu"


Place = tuple[tuple[int, int], ...]
"""A box of an array: its first position along each axis, and the one behind its last."""


class HostShards:
    """The parts of an array that this process's devices hold, in the host's memory.

    Attributes:
      parts: their values, which are to be set, by their places in the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding):
        self._shape, self._sharding = shape, sharding
        self._devices = _devices_by_place(shape, sharding)
        self.parts = {
            place: _empty(tuple(stop - start for start, stop in place), dtype)
            for place in self._devices
        }

    def of_layer(self, layer: int) -> dict[Place, np.ndarray]:
        """The parts of one layer, of an array whose first axis has the layers."""
        return {place[1:]: values[layer] for place, values in self.parts.items()}

    def to_array(self) -> jax.Array:
        """The array; the values must not change any more, since CPU devices share them."""
        on_devices = [
            jax.device_put(self.parts[place], device)
            for place, devices in self._devices.items()
            for device in devices
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, on_devices)


def _devices_by_place(shape: tuple[int, ...], sharding: NamedSharding) -> dict[Place, list[Any]]:
    """This process's devices, by the part of an array that they hold."""
    devices: dict[Place, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        place = tuple(
            along.indices(size)[:2] for along, size in zip(index or (), shape, strict=True)
        )
        devices.setdefault(place, []).append(device)
    return devices


ALIGNMENT = 64
"""Bytes to whose multiples JAX's CPU devices align what they share with the host."""


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that a CPU device takes over without copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _of_layer(sharding: NamedSharding, parameter: UnstackedParameter) -> NamedSharding:
    """The sharding of one layer of a parameter; layers are never divided over devices."""
    if parameter.layer is None:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


class _Reading(NamedTuple):
    """What this process needs of one tensor."""

    rows: Rows
    pieces: list[tuple[Place, Piece]]
    """The pieces of these rows, with the places of the parts that they belong to."""


def _readings(parameter: UnstackedParameter, sharding: NamedSharding) -> Iterator[_Reading]:
    """What this process needs of each of a parameter's tensors."""
    by_place = {
        place: pieces_of(parameter, tuple(slice(*along) for along in place))
        for place in _devices_by_place(parameter.shape, sharding)
    }
    for name in parameter.tensor_names:
        pieces = [(place, found[name]) for place, found in by_place.items() if name in found]
        if pieces:
            first = min(piece.within[0].start for _, piece in pieces)
            end = max(piece.within[0].stop for _, piece in pieces)
            yield _Reading(Rows(name, first, end), pieces)


def _copy(
    rows: np.ndarray,
    reading: _Reading,
    parameter: UnstackedParameter,
    parts: Mapping[Place, np.ndarray],
) -> bool:
    """Copies what was read into the parts of a parameter. Returns whether it is finite."""
    finite = True
    for place, piece in reading.pieces:
        first, *others = piece.within
        start, stop = first.start - reading.rows.start, first.stop - reading.rows.start
        box = rows[(slice(start, stop), *others)]
        finite = copy_piece(box, piece, parameter, parts[place]) and finite
    return finite


def _check_tensors(
    folder: Path,
    config: ModelConfig,
    files: SafetensorsFolder,
    parameters: Sequence[UnstackedParameter],
) -> None:
    """Raises InputError unless the checkpoint holds the model's tensors and no others."""
    expected = {
        name: parameter.tensor_shape for parameter in parameters for name in parameter.tensor_names
    }
    for name, shape in expected.items():
        if name not in files.tensors:
            raise InputError(
                f"{folder}: tensor {name} {shape} is missing, but {CONFIG} asks for it"
            )
        found = files.tensors[name]
        if found.shape != shape:
            raise InputError(
                f"{found.file}: {name} has shape {found.shape}, but {CONFIG} asks for {shape}"
            )
    for name in sorted(files.tensors.keys() - expected.keys()):
        found = files.tensors[name]
        if _repeats_embedding(name, config, files):
            continue
        if config.loop.scheme == "no_loop" and is_gate(name):
            raise InputError(
                f"{found.file}: {name} {found.shape} is a gate of a looped model, but {CONFIG} "
                "names a model without loops, which would generate fluent, wrong text; set "
                "model_type to iquestpltcoder, iquestloopcoder or iquest_moe"
            )
        raise InputError(
            f"{found.file}: tensor {name} {found.shape} has no place in the model of {CONFIG}"
        )


def _not_finite(files: SafetensorsFolder, parameter: UnstackedParameter, dtype: np.dtype) -> str:
    """What is wrong with a parameter that holds NaN or infinite numbers."""
    for name in parameter.tensor_names:
        file = files.tensors[name].file
        if not np.isfinite(files.read(name)).all():
            return (
                f"{file}: {name} holds numbers that are not finite (NaN or infinite), with which a "
                "model writes nothing; get a sound copy of the file"
            )
    return (
        f"{parameter.tensor_names[0]} holds numbers that {dtype} cannot hold; choose another dtype"
    )


def _repeats_embedding(name: str, config: ModelConfig, files: SafetensorsFolder) -> bool:
    """Whether a tensor is a tied head that repeats the embedding.

    Raises:
      InputError: it is a tied head that differs from the embedding.
    """
    if name != "lm_head.weight" or not config.tied_embeddings:
        return False
    head, embedding = files.read(name), files.read("model.embed_tokens.weight")
    if not np.array_equal(head, embedding):
        raise InputError(
            f"{files.tensors[name].file}: {name} differs from model.embed_tokens.weight, but "
            f"tie_word_embeddings is true in {CONFIG}; set it to false"
        )
    return True


def _leaf_dtypes(
    files: SafetensorsFolder, parameters: Sequence[UnstackedParameter], dtype: str | None
) -> dict[tuple[str, ...], np.dtype]:
    """The dtype of each parameter: the one asked for, or one that holds all its tensors' values."""
    dtypes: dict[tuple[str, ...], np.dtype] = {}
    for parameter in parameters:
        for name in parameter.tensor_names:
            stored = files.tensors[name].dtype
            known = dtypes.get(parameter.path, stored)
            dtypes[parameter.path] = jnp.dtype(dtype or jnp.promote_types(known, stored))
    return dtypes


@functools.cache
def _layer_writer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """A compiled `write(leaf, part, layer)` that puts one layer's values into the stacked parameter
    `leaf`, which it donates."""

    def write(leaf: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        # Bits are updated, because jax 0.10 on a CPU converts a whole bfloat16 array to float32 to
        # update a part of it.
        bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        leaf_bits, part_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (leaf, part))
        updated = jax.lax.dynamic_update_index_in_dim(leaf_bits, part_bits, layer, axis=0)
        return jax.lax.bitcast_convert_type(updated, leaf.dtype)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
