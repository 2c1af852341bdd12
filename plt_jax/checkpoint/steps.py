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
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())
