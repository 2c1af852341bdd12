"""What is told of a run's checkpoints: a table of them, and whether their files are sound."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from plt_jax.checkpoint.manifest import (
    CheckpointManifest,
    DamagedError,
    find_damage,
    read_manifest,
    validation_loss,
)
from plt_jax.checkpoint.retention import reasons_to_keep
from plt_jax.checkpoint.steps import list_steps
from plt_jax.config.yaml_file import load_resolved
from plt_jax.errors import InputError
from plt_jax.reports.tables import aligned
from plt_jax.runs.names import CHECKPOINTS, CONFIG, locate


class Report(NamedTuple):
    """What was found in one checkpoint."""

    path: Path
    manifest: CheckpointManifest | None
    """None if it has none, or a damaged one."""
    damage: list[str]
    """One text for each problem."""
    seconds: float

    def lines(self) -> list[str]:
        """The finding: a line for each problem, or one that says that there is none."""
        if self.damage:
            return [f"{self.path}: {problem}" for problem in self.damage]
        if self.manifest is None:
            return [f"{self.path}: has no checksums (an earlier version saved it), not verified"]
        speed = self.manifest.size / 1e9 / max(self.seconds, 1e-9)
        return [
            f"{self.path}: sound, {len(self.manifest.files)} files, "
            f"{describe_size(self.manifest.size)}, {speed:.2f} GB/s"
        ]


def verify_checkpoints(path: str | Path) -> Iterator[Report]:
    """Checks the checkpoint that a path names, or all of the run that it leads to, oldest first.

    Raises:
      InputError: it leads to none.
    """
    directory, steps = find_steps(path)
    for step in steps:
        checkpoint = directory / CHECKPOINTS / str(step)
        began = time.perf_counter()
        damage = find_damage(checkpoint)
        if not checkpoint.exists():
            continue  # the run that saves them has removed it meanwhile
        manifest = None if damage else read_manifest(checkpoint)
        yield Report(checkpoint, manifest, damage, time.perf_counter() - began)


def list_checkpoints(path: str | Path) -> str:
    """A table of a run's checkpoints, or the one that a path names.

    Raises:
      InputError: it leads to none.
    """
    directory, steps = find_steps(path)
    folder = directory / CHECKPOINTS
    others = sorted(entry.name for entry in folder.iterdir() if not entry.name.isdigit())
    notes = [f"not a checkpoint: {folder / name}" for name in others]
    return "\n".join([aligned(tabulate(directory, steps), left=0), *notes])


def tabulate(directory: Path, steps: Sequence[int]) -> list[list[str]]:
    """The cells of a table of checkpoints in a run directory, line by line below their titles."""
    folder = directory / CHECKPOINTS
    every = {step: validation_loss(folder / str(step)) for step in list_steps(folder)}
    reasons = reasons_to_keep(every, load_resolved(directory / CONFIG).checkpoint)
    rows = [["step", "size", "saved", "validation loss", "kept as", "files"]]
    for step in steps:
        with contextlib.suppress(FileNotFoundError):  # of one that its run removes meanwhile
            saved = time.localtime(saved_at(folder / str(step)))
            rows.append(
                [
                    str(step),
                    describe_size(folder_size(folder / str(step))),
                    time.strftime("%Y-%m-%d %H:%M:%S", saved),
                    "" if every[step] is None else f"{every[step]:.4f}",
                    ", ".join(reasons[step]),
                    describe_files(folder / str(step)),
                ]
            )
    return rows


def find_steps(path: str | Path) -> tuple[Path, list[int]]:
    """The run directory that a path leads to, and the step that it names or all there are.

    Raises:
      InputError: there are none, or that one is not complete.
    """
    directory, step = locate(path)
    steps = list_steps(directory / CHECKPOINTS)
    if not steps:
        raise InputError(f"{directory / CHECKPOINTS} holds no checkpoint")
    return directory, steps if step is None else [step]


def describe_files(checkpoint: Path) -> str:
    """The state of a checkpoint's files as far as it shows without reading them."""
    damage = find_damage(checkpoint, contents=False)
    if damage:
        return f"damaged: {damage[0]}" + (f" ({len(damage) - 1} more)" if damage[1:] else "")
    return "complete" if read_manifest(checkpoint) else "no checksums"


def saved_at(checkpoint: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970."""
    try:
        manifest = read_manifest(checkpoint)
    except DamagedError:
        manifest = None
    return checkpoint.stat().st_mtime if manifest is None else manifest.saved


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe_size(size: int) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
