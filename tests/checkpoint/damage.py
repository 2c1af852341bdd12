"""Ways to damage a checkpoint, and small ones to damage."""

import json
from pathlib import Path

import jax.numpy as jnp

from plt_jax.checkpoint.manifest import MANIFEST, METADATA
from plt_jax.checkpoint.store import Checkpoints
from plt_jax.config import CheckpointConfig


def save_steps(directory: Path, *steps: int, config: CheckpointConfig | None = None) -> None:
    """Saves a tiny checkpoint of each step, with a validation loss that falls."""
    with Checkpoints(directory, config or CheckpointConfig(keep=len(steps))) as checkpoints:
        for step in steps:
            params, optimizer = {"x": jnp.full(3, step)}, {"y": jnp.arange(40.0) + step}
            checkpoints.save(step, params, optimizer, {"next_index": step}, 9.0 - step)


def files_of(checkpoint: Path) -> list[str]:
    """The names of all files of a checkpoint."""
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(path.relative_to(checkpoint).as_posix() for path in files)


def flip_bit(path: Path, position: int = 0, bit: int = 0) -> None:
    """Flips one bit of a file."""
    contents = bytearray(path.read_bytes())
    contents[position % len(contents)] ^= 1 << bit
    path.write_bytes(contents)


def data_file(checkpoint: Path, folder: str = "params") -> Path:
    """The largest file of a folder of a checkpoint."""
    files = (path for path in (checkpoint / folder).rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def forget_checksums(checkpoint: Path) -> None:
    """Makes a checkpoint one of the versions that had no manifest."""
    (checkpoint / MANIFEST).unlink()
    metadata = json.loads((checkpoint / METADATA).read_text())
    (checkpoint / METADATA).write_text(json.dumps(metadata | {"custom_metadata": {}}))
