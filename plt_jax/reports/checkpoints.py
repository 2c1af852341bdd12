"""Reports on a run's checkpoints: a table of them, and the result of verifying their files."""

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
from plt_jax.checkpoint.steps import is_step, list_steps
from plt_jax.config.yaml_file import load_resolved
from plt_jax.errors import InputError
from plt_jax.files.paths import files_in
from plt_jax.reports.tables import aligned
from plt_jax.runs.names import CHECKPOINTS, CONFIG, locate


class Verification(NamedTuple):
    """The result of verifying one checkpoint."""

    path: Path
    manifest: CheckpointManifest | None
    """None if the checkpoint has no manifest, or a damaged one."""
    damage: list[str]
    """A description of each problem."""
    seconds: float
    """How long the verification took."""

    def lines(self) -> list[str]:
        """A line for each problem, or one line if there is none."""
        if self.damage:
            return [f"{self.path}: {problem}" for problem in self.damage]
        if self.manifest is None:
            return [f"{self.path}: has no checksums (an earlier version saved it), not verified"]
        speed = self.manifest.size / 1e9 / max(self.seconds, 1e-9)
        return [
            f"{self.path}: sound, {len(self.manifest.files)} files, "
            f"{describe_size(self.manifest.size)}, {speed:.2f} GB/s"
        ]


def verify_checkpoints(path: str | Path) -> Iterator[Verification]:
    """Verifies the checkpoint at a path, or all checkpoints of the run there, oldest first.

    Raises:
      InputError: there is no checkpoint at the path.
    """
    directory, steps = find_steps(path)
    for step in steps:
        checkpoint = directory / CHECKPOINTS / str(step)
        began = time.perf_counter()
        damage = find_damage(checkpoint)
        if not checkpoint.exists():
            continue  # the run has removed it in the meantime
        manifest = None if damage else read_manifest(checkpoint)
        yield Verification(checkpoint, manifest, damage, time.perf_counter() - began)


def list_checkpoints(path: str | Path) -> str:
    """A table of the checkpoint at a path, or of all checkpoints of the run there.

    Raises:
      InputError: there is no checkpoint at the path.
    """
    directory, steps = find_steps(path)
    folder = directory / CHECKPOINTS
    others = sorted(entry.name for entry in folder.iterdir() if not is_step(entry.name))
    notes = [f"not a checkpoint: {folder / name}" for name in others]
    return "\n".join([aligned(tabulate(directory, steps), left=0), *notes])


def tabulate(directory: Path, steps: Sequence[int]) -> list[list[str]]:
    """Cells of a table of a run's checkpoints, row by row, with the titles first."""
    folder = directory / CHECKPOINTS
    every = {step: validation_loss(folder / str(step)) for step in list_steps(folder)}
    reasons = reasons_to_keep(every, load_resolved(directory / CONFIG).checkpoint)
    rows = [["step", "size", "saved", "validation loss", "kept as", "files"]]
    for step in steps:
        with contextlib.suppress(FileNotFoundError):  # the run may remove it in the meantime
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
    """The run directory of a path, and the step of the checkpoint there, or all steps of the run.

    Raises:
      InputError: the run has no checkpoint, or that checkpoint is not complete.
    """
    directory, step = locate(path)
    steps = list_steps(directory / CHECKPOINTS)
    if not steps:
        raise InputError(f"{directory / CHECKPOINTS} holds no checkpoint")
    return directory, steps if step is None else [step]


def describe_files(checkpoint: Path) -> str:
    """The state of a checkpoint's files, found without reading them."""
    damage = find_damage(checkpoint, contents=False)
    if damage:
        return f"damaged: {damage[0]}" + (f" ({len(damage) - 1} more)" if damage[1:] else "")
    return "complete" if read_manifest(checkpoint) else "no checksums"


def saved_at(checkpoint: Path) -> float:
    """The Unix time at which a checkpoint was saved."""
    try:
        manifest = read_manifest(checkpoint)
    except DamagedError:
        manifest = None
    return checkpoint.stat().st_mtime if manifest is None else manifest.saved


def folder_size(folder: Path) -> int:
    """Size of all files in a folder and its subfolders, in bytes."""
    return sum((folder / name).stat().st_size for name in files_in(folder))


def describe_size(size: int) -> str:
    """A number of bytes in B, kB, MB or GB."""
    scaled = float(size)
    for unit in ("B", "kB", "MB"):
        if scaled < 999.5:
            return f"{scaled:.3g} {unit}"
        scaled /= 1000
    return f"{scaled:,.1f} GB"
