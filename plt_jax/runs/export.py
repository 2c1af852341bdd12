"""Exporting a checkpoint's parameters to a run directory of their own."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from plt_jax.data.tokenizer import HUGGINGFACE
from plt_jax.files.folders import check_new_folder
from plt_jax.interop.tokenizer_files import companion_files
from plt_jax.runs.directory import create_run, find_checkpoint, read_params, tokenizer_of


def export_params(
    path: str | Path,
    destination: str | Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> str:
    """Makes a run directory with one checkpoint, of step 0, that holds the parameters alone.

    With several processes all must call it. Each reads and writes what its devices hold.

    Args:
      path: a run directory (its newest checkpoint) or one of its checkpoints/STEP.
      destination: the new run directory.
      dtype: the dtype that the parameters are stored in; default their own.
      mesh: the devices that hold the parameters; default one device.

    Returns:
      Two lines that say what was written.

    Raises:
      InputError: there is no undamaged checkpoint, or the destination is not empty; nothing is
        written then.
    """
    check_new_folder(destination)
    found = find_checkpoint(path)
    params = read_params(found, mesh, dtype)
    create_run(
        found.config.model_copy(update={"run_dir": str(destination), "start_from": None}),
        params,
        tokenizer_of(found),
        companion_files(found.directory / HUGGINGFACE),
    )
    leaves = jax.tree.leaves(params)
    size, dtypes = sum(leaf.nbytes for leaf in leaves), sorted({leaf.dtype.name for leaf in leaves})
    return (
        f"exported {found.directory}, step {found.step}: {sum(leaf.size for leaf in leaves):,} "
        f"parameters, {', '.join(dtypes)}, {size / 1e9:.2f} GB\nwritten to {destination}"
    )
