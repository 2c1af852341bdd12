"""Hugging Face checkpoints to configurations and parameters.

Parameters are read one layer at a time, from the files straight into the stacked and sharded
arrays. The host holds one parameter of one layer and the files under way, and never the whole model
twice.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
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
from plt_jax.files import expand, read_json
from plt_jax.interop.config_json import CONFIG
from plt_jax.interop.config_reader import read_config
from plt_jax.interop.options import DTYPES
from plt_jax.interop.safetensors_folder import SafetensorsFolder
from plt_jax.interop.tensor_layout import read_part
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
    if not os.path.isdir(folder):  # False also for an impossible name
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
    # Parameters are read file by file, so that few files are open at a time.
    order = sorted(
        checkpoint.parameters, key=lambda parameter: files.tensors[parameter.tensor_names[0]].file
    )
    params: dict[tuple[str, ...], jax.Array] = {}
    for position, parameter in enumerate(track(order)):
        path, sharding = parameter.path, shardings[parameter.path]
        files.keep_open([later.tensor_names[0] for later in order[position:]])

        def read(index: Any, parameter: UnstackedParameter = parameter) -> np.ndarray:
            part = read_part(files.read, parameter, index)
            part = part.astype(dtypes[parameter.path], copy=False)
            if not np.isfinite(part).all():
                raise InputError(_not_finite(files, parameter, part.dtype))
            return part

        if parameter.layer is None:
            params[path] = jax.make_array_from_callback(parameter.shape, sharding, read)
            continue
        one_layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        part = jax.make_array_from_callback(parameter.shape, one_layer, read)
        if path not in params:
            params[path] = jnp.zeros(shapes[path].shape, part.dtype, device=sharding)
        params[path] = _layer_writer(sharding)(params[path], part, parameter.layer)
    return jax.block_until_ready(unflatten_dict(params))


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
