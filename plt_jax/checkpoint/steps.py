"""The complete checkpoints of a folder."""

from __future__ import annotations

from pathlib import Path

from plt_jax.buckets.address import is_in_bucket
from plt_jax.checkpoint.manifest import MANIFEST
from plt_jax.files.paths import is_folder, to_path


def list_steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a folder such as RUN/checkpoints, ascending."""
    directory = to_path(directory)
    if not is_folder(directory):
        return []
    entries = [entry for entry in directory.iterdir() if is_step(entry.name)]
    return sorted(int(entry.name) for entry in entries if is_complete(entry))


def is_complete(checkpoint: Path) -> bool:
    """Whether the save of a checkpoint, which has its name, has ended.

    On a disk it has been renamed then. In a bucket, where nothing can be renamed, its manifest is
    the last object.
    """
    return not is_in_bucket(checkpoint) or (checkpoint / MANIFEST).exists()


def is_step(name: str) -> bool:
    """Whether a folder's name is that of a checkpoint."""
    # Other scripts have digits, too, and int() reads them; orbax writes no leading zeros.
    return name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")
