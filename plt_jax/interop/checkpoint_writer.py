"""Configurations and parameters to Hugging Face checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from plt_jax.config import ModelConfig
from plt_jax.distributed import processes
from plt_jax.distributed.gathering import gather_part
from plt_jax.errors import InputError
from plt_jax.interop.config_json import CONFIG
from plt_jax.interop.config_writer import write_config
from plt_jax.interop.options import DTYPES, SHARD_BYTES
from plt_jax.interop.safetensors_folder import write_safetensors
from plt_jax.interop.tensor_layout import to_tensor
from plt_jax.interop.tensors import Params, UnstackedParameter, leaves_by_path, unstacked_parameters
from plt_jax.model.transformer import abstract_params


def check_exportable(config: ModelConfig, params: Params, dtype: str | None = None) -> None:
    """Raises InputError if `write_huggingface` cannot write the whole model."""
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    write_config(config, "float32", {})
    leaves = leaves_by_path(params)
    shapes = leaves_by_path(abstract_params(config))
    wanted = {path: tuple(leaf.shape) for path, leaf in shapes.items()}
    for path in sorted(wanted.keys() | leaves.keys()):
        found = tuple(leaves[path].shape) if path in leaves else None
        if found != wanted.get(path):
            raise InputError(
                f"parameter {'.'.join(path)} has shape {found}, and {wanted.get(path)} in the "
                "configuration"
            )


def write_huggingface(
    folder: Path,
    config: ModelConfig,
    params: Params,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors into an existing folder.

    With several processes all must call it, since each may hold a part of the parameters; process 0
    writes, and the folder need not exist for the others.

    Args:
      config, params, dtype, shard_bytes: as in `save_huggingface`; `check_exportable` accepts them.
      token_ids: bos_token_id and the like, which are copied into config.json.

    Raises:
      OSError: a file cannot be written.
    """
    leaves = leaves_by_path(params)
    # By tensor: its parameter, and its expert among that parameter's tensors.
    sources = {
        name: (parameter, expert)
        for parameter in unstacked_parameters(config)
        for expert, name in enumerate(parameter.tensor_names)
    }

    def dtype_of(parameter: UnstackedParameter) -> np.dtype:
        return jnp.dtype(dtype or leaves[parameter.path].dtype)

    def make_tensor(name: str) -> np.ndarray:
        parameter, expert = sources[name]
        index = () if parameter.layer is None else (parameter.layer,)
        index += (expert,) if parameter.by_expert else ()
        part = gather_part(leaves[parameter.path], index)
        if not processes.is_first():
            return part  # which is not whole
        return to_tensor(part.astype(dtype_of(parameter), copy=False), parameter)

    sizes = {
        name: math.prod(parameter.tensor_shape) * dtype_of(parameter).itemsize
        for name, (parameter, _) in sources.items()
    }
    if not processes.is_first():
        for name in sizes:  # in the order in which process 0 writes them
            make_tensor(name)
        return
    write_safetensors(folder, sizes, make_tensor, shard_bytes)
    stored = dtype_of(next(iter(sources.values()))[0]).name
    text = json.dumps(write_config(config, stored, token_ids or {}), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
