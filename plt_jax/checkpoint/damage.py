"""Damaged checkpoints: found by all processes together, refused by name, moved aside."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection
from pathlib import Path

import jax

from plt_jax.checkpoint.manifest import find_damage, has_checksums
from plt_jax.checkpoint.steps import list_steps
from plt_jax.distributed import processes
from plt_jax.errors import InputError
from plt_jax.files.paths import to_path

DAMAGED = ".damaged"
"""How the names of checkpoints end that were moved aside."""


def find_shared_damage(path: Path, inside: Collection[str] | None = None) -> list[str]:
    """What `find_damage` finds in this process's part of a checkpoint's files.

    Process 0 prints a line if the checkpoint has no checksums.
    """
    if processes.is_first() and not has_checksums(path):
        print(
            f"the checkpoint {path} has no checksums (an earlier version saved it), so it is read "
            "unverified",
            file=sys.stderr,
            flush=True,
        )
    return find_damage(path, inside, index=jax.process_index(), count=jax.process_count())


def refuse_damaged(
    directory: str | Path,
    step: int,
    inside: Collection[str] | None = None,
    advice: str | None = None,
) -> None:
    """Checks a checkpoint's files against its manifest; several processes share the reading.

    Args:
      directory: the folder of the checkpoints.
      step: the checkpoint's step.
      inside: the folders of it that are about to be read; default all.
      advice: what the user can do if it is damaged; default: to give the checkpoint before it.

    Raises:
      InputError: a file in this process's part is damaged.
    """
    path = (to_path(directory) / str(step)).absolute()
    damage = find_shared_damage(path, inside)
    if not damage:
        return
    before = [other for other in list_steps(directory) if other < step]
    if advice is None and before:
        advice = f"give the one before it, {path.with_name(str(before[-1]))}"
    raise InputError("; ".join(filter(None, [describe_damage(path, damage), advice])))


def describe_damage(path: Path, damage: list[str]) -> str:
    """The damage of a checkpoint, in one line."""
    more = f" ({len(damage) - 1} more such)" if len(damage) > 1 else ""
    return f"the checkpoint {path} is damaged: {damage[0]}{more}"


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is not found again, and returns its new path."""
    names = itertools.chain([DAMAGED], (f"{DAMAGED}-{number}" for number in itertools.count(2)))
    free = (path.with_name(path.name + name) for name in names)
    moved = next(other for other in free if not other.exists())
    path.rename(moved)
    return moved
