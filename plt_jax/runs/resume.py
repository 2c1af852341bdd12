"""A run directory as training uses it: checked before anything is written, then made.

A run may only be resumed with the configuration, the tokenizer and the text that it was begun
with, but for the fields that `MayChange` (config/types.py) marks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import can_resume
from plt_jax.config import RunConfig
from plt_jax.config.types import MAY_CHANGE, Section
from plt_jax.config.yaml_file import dump_config, load_resolved
from plt_jax.data.tokenizer import HUGGINGFACE, TOKENIZER, TextTokenizer, load_tokenizer
from plt_jax.errors import InputError
from plt_jax.files.folders import copy_file
from plt_jax.files.paths import check_reachable, files_in
from plt_jax.files.writing import UNFINISHED, write_text
from plt_jax.locks import LOCK, LOCK_FILE, Lock
from plt_jax.runs.names import CHECKPOINTS, CONFIG, TEXT, locate


class Change(NamedTuple):
    """A field that has two different values in two configurations."""

    name: str
    """The field's name from the root, as `data.sources[0].weight`."""
    old: Any
    new: Any
    allowed: bool
    """Whether the field, or a section around it, is marked as `MayChange`."""

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new}"


def changes_between(old: Section, new: Section, allowed: bool = False) -> Iterator[Change]:
    """The fields in which two configurations of one type differ, in the order of declaration.

    Args:
      allowed: whether the sections as a whole are marked as `MayChange`.
    """
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        marked = allowed or MAY_CHANGE in field.metadata
        if isinstance(before, Section):
            for change in changes_between(before, after, marked):
                yield change._replace(name=f"{name}.{change.name}")
        elif _are_sections(before) and _are_sections(after) and len(before) == len(after):
            for index, pair in enumerate(zip(before, after, strict=True)):
                for change in changes_between(*pair, marked):
                    yield change._replace(name=f"{name}[{index}].{change.name}")
        elif before != after:
            yield Change(name, before, after, marked)


def _are_sections(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, Section) for item in value)


def is_allowed(change: Change, config: RunConfig) -> bool:
    """Whether a run may be resumed with a changed field.

    Args:
      config: the configuration that the run is to be resumed with.
    """
    moe = config.model.moe
    has_router_losses = bool(moe.experts and (moe.load_balance_loss or moe.router_z_loss))
    # Each micro-batch has router losses of its own, so that their sum depends on the number.
    if change.name == "training.accumulate" and has_router_losses:
        return False
    return change.allowed


def check_directory(config: RunConfig) -> list[str]:
    """Checks that the run directory is new, empty, or holds a run that this configuration resumes.

    Returns:
      The changes since the run's last start, as `field: old -> new`.

    Raises:
      InputError: the directory holds something else, or a run whose configuration differs in a
        field that may not change.
    """
    directory = config.directory
    check_reachable(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--run_dir {directory} is a file; choose another")
    if not (directory / CONFIG).exists():
        names = [path.name for path in directory.iterdir()] if directory.exists() else []
        if any(not name.endswith(UNFINISHED) and name not in (LOCK, LOCK_FILE) for name in names):
            raise InputError(
                f"--run_dir {directory} is not empty and holds no {CONFIG}, so it is not a run to "
                "resume; choose another"
            )
        return []
    steps = list_steps(directory / CHECKPOINTS)
    if steps and not any(can_resume(directory / CHECKPOINTS, step) for step in steps):
        raise InputError(
            f"--run_dir {directory} holds parameters alone, with no optimizer's state to resume; "
            f"train from it in another: --start_from {directory} --run_dir ANOTHER"
        )
    changes = list(changes_between(load_resolved(directory / CONFIG), config))
    refused = [str(change) for change in changes if not is_allowed(change, config)]
    if refused:
        raise InputError(
            f"--run_dir {directory} was made with another config ({'; '.join(refused)}); "
            "choose another, or give the same values to resume it"
        )
    return [str(change) for change in changes]


def check_text(config: RunConfig, tokenizer: TextTokenizer, fingerprint: str) -> None:
    """Checks that a run to resume was begun with this text and tokenizer.

    Args:
      fingerprint: the text's, `data.load.Data.fingerprint`.

    Raises:
      InputError: the run was begun with others.
    """
    directory = config.directory
    same = {}
    if (directory / TOKENIZER).exists():
        same[TOKENIZER] = load_tokenizer(directory / TOKENIZER).identity == tokenizer.identity
    if (directory / TEXT).exists():  # runs of earlier versions have none
        same[TEXT] = (directory / TEXT).read_text(encoding="utf-8") == _text_file(fingerprint)
    for name, is_same in same.items():
        if not is_same:
            raise InputError(
                f"the training text or its tokenizer has changed since {directory / name} was "
                "written; bring back the text to resume, or choose another --run_dir"
            )


def take_lock(lock: Lock, directory: Path) -> None:
    """Takes the lock of a run directory, if that exists.

    Raises:
      InputError: another process trains there, or the directory cannot be opened.
    """
    check_reachable(directory)
    try:
        taken = lock.take()
    except OSError as error:
        raise InputError(f"cannot open --run_dir {directory}: {error.strerror}") from error
    if not taken:
        raise InputError(
            f"{lock.holder()} trains in --run_dir {directory}; wait until it has ended, or choose "
            "another"
        )


def make_directory(directory: Path, lock: Lock) -> None:
    """Makes the run directory, unless its lock is taken already, and takes the lock.

    Raises:
      InputError: it cannot be made, or another process has begun a run there since it was checked.
    """
    if lock.is_held:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make --run_dir {directory}: {error.strerror}") from error
    take_lock(lock, directory)
    if any(path.name != LOCK_FILE for path in directory.iterdir()):
        raise InputError(
            f"another process has begun a run in --run_dir {directory} meanwhile; start again to "
            "resume it, or choose another"
        )


def write_directory(config: RunConfig, tokenizer: TextTokenizer, fingerprint: str) -> Path:
    """Writes a run's configuration, tokenizer and the text's fingerprint to its directory.

    `check_directory` and `check_text` must have passed before, and `make_directory`.

    Raises:
      InputError: the directory cannot be written to.
    """
    directory = config.directory
    for left in directory.glob(f".*{UNFINISHED}"):
        # By a writer that was killed; another command may be writing a report at the moment.
        if left.is_file() and time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    write_text(directory / CONFIG, dump_config(config))
    tokenizer.save(directory)
    write_text(directory / TEXT, _text_file(fingerprint))
    if config.start_from is not None and not list_steps(directory / CHECKPOINTS):
        imported = locate(config.start_from).directory / HUGGINGFACE
        for name in files_in(imported):
            kept = directory / HUGGINGFACE / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            copy_file(imported / name, kept)
    return directory


def _text_file(fingerprint: str) -> str:
    return json.dumps({"fingerprint": fingerprint}) + "\n"
