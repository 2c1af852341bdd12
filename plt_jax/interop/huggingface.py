"""Hugging Face checkpoint folders to configurations and parameters, and back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from jax.sharding import Mesh

from plt_jax.config import ModelConfig
from plt_jax.distributed import processes
from plt_jax.files.folders import new_folder
from plt_jax.interop.checkpoint_reader import load_params, open_huggingface
from plt_jax.interop.checkpoint_writer import check_exportable, write_huggingface
from plt_jax.interop.options import SHARD_BYTES
from plt_jax.interop.tensors import Params


def load_huggingface(
    path: str | Path, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Reads a checkpoint folder: config.json and safetensors, one file or several with an index.

    Args:
      path: a folder of a model type in `model_types.MODEL_TYPES`.
      dtype: dtype of the parameters, "float32" or "bfloat16"; default: as they are stored.
      mesh: the devices that hold the parameters, by the rules of distributed/mesh.py; default: one
        device.

    Returns:
      The configuration, and parameters as `Transformer.init` gives them, unboxed. The dtype of the
      configuration is bfloat16 if the parameters are bfloat16, and float32 otherwise.

    Raises:
      InputError: the folder is not such a checkpoint, is damaged, or contradicts its config.json.
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

    With several processes all must call it, and process 0 writes.

    Args:
      path: a folder that does not exist, or is empty.
      params: parameters as `Transformer.init` gives them.
      dtype: dtype of the tensors, "float32" or "bfloat16"; default: the parameters'.
      shard_bytes: size limit of one file, in bytes.

    Raises:
      InputError: the folder is not empty or cannot be written, no Hugging Face model type can
        express the configuration, or the parameters do not have its shapes.
    """
    check_exportable(config, params, dtype)
    with new_folder(path) if processes.is_first() else nullcontext(Path(path)) as folder:
        write_huggingface(folder, config, params, dtype, shard_bytes)
