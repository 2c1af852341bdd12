"""Hugging Face checkpoints to configurations and parameters, and back.

Reading goes piece by piece (one parameter of one layer) from the files straight into the stacked,
sharded parameters: the host holds a piece and the files under way, never the whole model twice.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plt_jax.config import MeshConfig, ModelConfig
from plt_jax.distributed.mesh import make_mesh, shardings_of
from plt_jax.errors import InputError
from plt_jax.files import expand, new_folder
from plt_jax.interop.config_json import read_config, read_json, write_config
from plt_jax.interop.safetensors_folder import SafetensorsFolder, write_safetensors
from plt_jax.interop.tensors import IGNORED, Piece, is_gate, pieces_of, read_part, to_tensor
from plt_jax.model.transformer import abstract_params

CONFIG = "config.json"
DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 5 * 10**9

Params = dict[str, Any]


class Source(NamedTuple):
    """A checkpoint whose config and headers have been read and checked, and whose tensors not."""

    folder: Path
    model_type: str
    config: ModelConfig
    files: SafetensorsFolder
    pieces: list[Piece]
    dtypes: dict[tuple[str, ...], np.dtype]
    """Of the parameters to make, by their paths."""


def load_huggingface(
    path: str | Path, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Reads a checkpoint folder: config.json and safetensors, one file or several with an index.

    Args:
      path: a folder of model type iquestpltcoder, iquestloopcoder, iquest_moe, llama, qwen2 or
        qwen3.
      dtype: of the parameters, "float32" or "bfloat16"; default as they are stored.
      mesh: where the parameters go, by the rules of distributed/mesh.py; default one device.

    Returns:
      The configuration, which computes in bfloat16 if the parameters are that and else in float32,
      and parameters as `Transformer.init` gives them, unboxed.

    Raises:
      InputError: the folder is no such checkpoint, is damaged, or does not fit its config.json.
    """
    source = open_huggingface(path, dtype)
    return source.config, load_params(source, mesh)


def save_huggingface(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Args:
      path: a folder that does not exist, or is empty.
      params: as `Transformer.init` gives them.
      dtype: of the tensors, "float32" or "bfloat16"; default the parameters'.
      shard_bytes: most bytes of one file.

    Raises:
      InputError: the folder is taken or unwritable, no public model type can say what the
        configuration says, or the parameters are another configuration's.
    """
    check_exportable(config, params, dtype)
    with new_folder(path) as folder:
        write_huggingface(folder, config, params, dtype, shard_bytes)


def open_huggingface(path: str | Path, dtype: str | None = None) -> Source:
    """Reads and checks a checkpoint's config.json and headers; see `load_huggingface`."""
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    folder = expand(path)
    if not os.path.isdir(folder):  # False, too, where the name is impossible
        raise InputError(f"{folder} is not a folder; give one that holds {CONFIG} and safetensors")
    values = read_json(folder / CONFIG)
    files = SafetensorsFolder(folder, IGNORED)
    try:
        name, config = read_config(values, files.tensors)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    if config.layers > len(files.tensors):
        raise InputError(
            f"{folder / CONFIG} names {config.layers} layers, but there are only "
            f"{len(files.tensors)} tensors"
        )
    pieces = pieces_of(config, files.tensors)
    _check_tensors(folder, config, files, pieces)
    dtypes = _leaf_dtypes(files, pieces, dtype)
    if dtypes["embedding",] == jnp.bfloat16:
        config = config.model_copy(update={"dtype": "bfloat16"})
    return Source(folder, name, config, files, pieces, dtypes)


def load_params(
    source: Source,
    mesh: Mesh | None = None,
    track: Callable[[Sequence[Piece]], Iterable[Piece]] = iter,
) -> Params:
    """Reads the parameters; see `load_huggingface`. `track` sees every piece as it is read."""
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    boxed = abstract_params(source.config)
    shapes, shardings = flatten_dict(nn.unbox(boxed)), flatten_dict(shardings_of(boxed, mesh))
    files, dtypes = source.files, source.dtypes
    # File by file, so that few are open at a time.
    order = sorted(source.pieces, key=lambda piece: files.tensors[piece.names[0]].file)
    params: dict[tuple[str, ...], jax.Array] = {}
    for position, piece in enumerate(track(order)):
        path, sharding = piece.path, shardings[piece.path]
        files.keep_open([later.names[0] for later in order[position:]])

        def read(index: tuple[slice, ...], piece: Piece = piece) -> np.ndarray:
            return read_part(files.read, piece, index).astype(dtypes[piece.path], copy=False)

        if piece.layer is None:
            params[path] = jax.make_array_from_callback(piece.shape, sharding, read)
            continue
        one_layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        part = jax.make_array_from_callback(piece.shape, one_layer, read)
        if path not in params:
            params[path] = jnp.zeros(shapes[path].shape, part.dtype, device=sharding)
        params[path] = _layer_writer(sharding)(params[path], part, piece.layer)
    return jax.block_until_ready(unflatten_dict(params))


def check_exportable(config: ModelConfig, params: Params, dtype: str | None = None) -> None:
    """Raises InputError where `write_huggingface` could not write all of the model."""
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    write_config(config, "float32", {})
    leaves = flatten_dict(nn.unbox(params))
    shapes = flatten_dict(nn.unbox(abstract_params(config)))
    wanted = {path: tuple(leaf.shape) for path, leaf in shapes.items()}
    for path in sorted(wanted.keys() | leaves.keys()):
        found = tuple(leaves[path].shape) if path in leaves else None
        if found != wanted.get(path):
            raise InputError(
                f"parameter {'.'.join(path)} has shape {found}, and {wanted.get(path)} in the "
                "configuration"
            )
        if isinstance(leaves[path], jax.Array) and not leaves[path].is_fully_addressable:
            raise InputError("parameters spread over several processes cannot be exported")


def write_huggingface(
    folder: Path,
    config: ModelConfig,
    params: Params,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors into an existing folder; see `save_huggingface`."""
    leaves = flatten_dict(nn.unbox(params))
    where = {
        name: (piece, number)
        for piece in pieces_of(config)
        for number, name in enumerate(piece.names)
    }

    def dtype_of(piece: Piece) -> np.dtype:
        return jnp.dtype(dtype or leaves[piece.path].dtype)

    def tensor(name: str) -> np.ndarray:
        piece, expert = where[name]
        index = () if piece.layer is None else (piece.layer,)
        index += (expert,) if piece.by_expert else ()
        part = np.asarray(leaves[piece.path][index])
        return to_tensor(part.astype(dtype_of(piece), copy=False), piece)

    sizes = {
        name: int(np.prod(piece.tensor_shape)) * dtype_of(piece).itemsize
        for name, (piece, _) in where.items()
    }
    write_safetensors(folder, sizes, tensor, shard_bytes)
    stored = dtype_of(next(iter(where.values()))[0]).name
    text = json.dumps(write_config(config, stored, token_ids or {}), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _check_tensors(
    folder: Path, config: ModelConfig, files: SafetensorsFolder, pieces: Sequence[Piece]
) -> None:
    """Raises InputError unless the checkpoint holds the model's tensors and no others."""
    expected = {name: piece.tensor_shape for piece in pieces for name in piece.names}
    for name, shape in expected.items():
        if name not in files.tensors:
            raise InputError(f"{folder}: tensor {name} {shape} is missing, by its {CONFIG}")
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
                "names a model without loops; run once, its text is fluent and wrong: set "
                "model_type to iquestpltcoder, iquestloopcoder or iquest_moe"
            )
        raise InputError(
            f"{found.file}: tensor {name} {found.shape} has no place in the model of {CONFIG}"
        )


def _repeats_embedding(name: str, config: ModelConfig, files: SafetensorsFolder) -> bool:
    """Whether a tensor is a tied head, stored a second time."""
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
    files: SafetensorsFolder, pieces: Sequence[Piece], dtype: str | None
) -> dict[tuple[str, ...], np.dtype]:
    """The dtype of each parameter: as asked, or one that holds what its tensors are stored as."""
    dtypes: dict[tuple[str, ...], np.dtype] = {}
    for piece in pieces:
        for name in piece.names:
            stored = files.tensors[name].dtype
            known = dtypes.get(piece.path, stored)
            dtypes[piece.path] = jnp.dtype(dtype or jnp.promote_types(known, stored))
    return dtypes


@functools.cache
def _layer_writer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """`write(leaf, part, layer)` puts a layer's part into the stacked parameter, in place."""

    def write(leaf: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        # As bits: on a CPU, jax 0.10 converts a whole bfloat16 array to update a part of it.
        bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        leaf_bits, part_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (leaf, part))
        updated = jax.lax.dynamic_update_index_in_dim(leaf_bits, part_bits, layer, axis=0)
        return jax.lax.bitcast_convert_type(updated, leaf.dtype)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
