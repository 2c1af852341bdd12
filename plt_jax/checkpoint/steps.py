"""The complete checkpoints of a folder."""

from __future__ import annotations

import os
from pathlib import Path


def list_steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a folder such as RUN/checkpoints, ascending."""
    directory = Path(directory)
    if not os.path.isdir(directory):  # False also for impossible names
        return []
    # Orbax writes under a temporary name and renames when complete.
    names = (entry.name for entry in directory.iterdir())
    return sorted(int(name) for name in names if is_step(name))


def is_step(name: str) -> bool:
    """Whether a folder's name is that of a checkpoint."""
    # Other scripts have digits, too, and int() reads them; orbax writes no leading zeros.
    return name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")
