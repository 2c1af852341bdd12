"""Writing and reading checkpoints: the only file that knows orbax.

A checkpoint holds, in a folder named by its step, the parameters, the optimizer's state and the
data iterator's, so that evaluation can read the parameters alone and training can go on exactly.
It is written under another name, gets its manifest (see manifest.py), and then takes its own: a
folder whose name is a number is complete.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from plt_jax.checkpoint.manifest import (
    MARK,
    File,
    find_damage,
    has_checksums,
    own_files,
    take_checksums,
    validation_loss,
    write_manifest,
)
from plt_jax.checkpoint.retention import reasons_to_keep
from plt_jax.checkpoint.steps import list_steps
from plt_jax.config import CheckpointConfig
from plt_jax.distributed import processes
from plt_jax.errors import FailedError, InputError

# Orbax reports every save and restore in several lines, and failures with their stack; what users
# need to know, we print.
logging.getLogger("absl").setLevel(logging.CRITICAL)

UNFINISHED, DELETED, DAMAGED = ".unfinished", ".deleted", ".damaged"
_LEFTOVER = re.compile(rf"\d+({UNFINISHED}|{DELETED}|\.orbax-checkpoint-tmp).*")
# A folder that cannot be made then fails at once, with its reason.
_CONTEXT = ocp.Context(
    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)
)
FAILURES = (OSError, ValueError, RuntimeError)
"""What orbax, tensorstore (a full disk is a ValueError) and JAX raise where saving fails."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What they raise where files are missing or hold something else."""
_numbers = itertools.count()
"""Saves are numbered, for the keys by which processes exchange what belongs to one."""


class Checkpoints:
    """Saves the checkpoints of one run, in the background; use as a context manager, which waits
    for the last one at its end."""

    def __init__(self, directory: str | Path, config: CheckpointConfig, patience: int = 300):
        """Removes what an interrupted save or removal left in the directory.

        Args:
          patience: seconds that a save waits for the checksums of other processes.
        """
        self._directory, self._config = Path(directory).absolute(), config
        self._patience = patience
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[Path, Future] | None = None
        if processes.is_first() and self._directory.is_dir():
            for entry in self._directory.iterdir():
                if _LEFTOVER.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        try:
            self.wait()
        except FailedError as failed:
            if error is None:
                raise
            print(f"error: {failed}", file=sys.stderr, flush=True)  # what ended the run goes on
        finally:
            self._thread.shutdown()

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        data: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Starts saving; returns once the arrays are copied. Waits for the save before it.

        Args:
          params, optimizer: trees of arrays, stored apart.
          data: the data iterator's state after the step's batch, the same in all processes.
          validation_loss: nats per token, by which the best checkpoints are kept.

        Raises:
          FailedError: this save cannot begin, or the one before did not succeed.
        """
        self.wait()
        final = self._directory / str(step)
        unfinished = final.with_name(final.name + UNFINISHED)
        trees = {"params": params, "optimizer": optimizer, "data": data}
        try:
            with _CONTEXT:
                response = ocp.save_checkpointables_async(unfinished, trees, custom_metadata=MARK)
        except FAILURES as error:
            raise self._failed(final, error) from error
        complete = (response, unfinished, final, validation_loss, next(_numbers))
        self._saving = final, self._thread.submit(self._complete, *complete)

    def wait(self) -> None:
        """Waits until a save under way is complete.

        Raises:
          FailedError: it did not succeed, or what is no longer kept cannot be removed; says why.
        """
        if self._saving is None:
            return
        (final, future), self._saving = self._saving, None
        try:
            future.result()
        except FailedError:
            raise
        except FAILURES as error:
            raise self._failed(final, error) from error

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The parameters, optimizer state, and data iterator's state of a step.

        Args:
          params, optimizer: the abstract trees, with shardings, that the arrays are read into.

        Raises:
          InputError: they cannot be read.
        """
        path = self._directory / str(step)
        if not processes.is_single():
            _wait_for(path, self._patience)
        wanted = {"params": params, "optimizer": optimizer, "data": None}
        # Earlier versions kept the data's state as one process's own.
        earlier = path / "data" / "process_0-of-1.json"
        if earlier.exists():
            del wanted["data"]
        try:
            restored = ocp.load_checkpointables(path, wanted)
            data = restored.get("data") or json.loads(earlier.read_text(encoding="utf-8"))
        except UNREADABLE as error:
            raise _unreadable(path, error) from error
        return restored["params"], restored["optimizer"], data

    def _complete(
        self,
        response: Any,
        unfinished: Path,
        final: Path,
        loss: float | None,
        number: int,
    ) -> None:
        """Waits until all is written, adds the manifest, and gives the checkpoint its name."""
        response.result()
        _wait_for(unfinished, self._patience)
        own = take_checksums(unfinished, own_files(unfinished, jax.process_index()))
        gathered = processes.gather(f"checksums/{number}", json.dumps(own), self._patience)
        if not processes.is_first():
            return
        files = {name: File(*file) for text in gathered for name, file in json.loads(text).items()}
        write_manifest(unfinished, files, loss)
        unfinished.rename(final)
        losses = {
            step: validation_loss(self._directory / str(step))
            for step in list_steps(self._directory)
        }
        for step, reasons in reasons_to_keep(losses, self._config).items():
            if not reasons:
                _remove(self._directory / str(step))

    def _failed(self, final: Path, error: Exception) -> FailedError:
        steps = list_steps(self._directory)
        last = f"the last complete one is of step {steps[-1]}" if steps else "there is none yet"
        return FailedError(f"cannot save the checkpoint {final}: {_reason(error)}; {last}")


def find_shared_damage(path: Path, inside: Collection[str] | None = None) -> list[str]:
    """What `find_damage` finds in this process's part of a checkpoint's files; says so in the first
    where there is nothing to check them against."""
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
      inside: the folders that are about to be read; default all.
      advice: what the user may do if it is damaged; default to give the checkpoint before it.

    Raises:
      InputError: some are damaged, in this process's part of them.
    """
    path = (Path(directory) / str(step)).absolute()
    damage = find_shared_damage(path, inside)
    if not damage:
        return
    before = [other for other in list_steps(directory) if other < step]
    if advice is None and before:
        advice = f"give the one before it, {path.with_name(str(before[-1]))}"
    raise InputError("; ".join(filter(None, [describe_damage(path, damage), advice])))


def describe_damage(path: Path, damage: list[str]) -> str:
    """What is wrong with a checkpoint, in one line."""
    more = f" ({len(damage) - 1} more such)" if len(damage) > 1 else ""
    return f"the checkpoint {path} is damaged: {damage[0]}{more}"


def set_aside(path: Path) -> Path:
    """Gives a damaged checkpoint another name, under which nothing looks for it, and returns it."""
    names = itertools.chain([DAMAGED], (f"{DAMAGED}-{number}" for number in itertools.count(2)))
    free = (path.with_name(path.name + name) for name in names)
    moved = next(other for other in free if not other.exists())
    path.rename(moved)
    return moved


def save_params(directory: str | Path, step: int, params: Any) -> None:
    """Writes a checkpoint that holds parameters alone; returns when it is complete.

    Raises:
      OSError: it cannot be written.
    """
    path = (Path(directory) / str(step)).absolute()
    try:
        path.parent.mkdir(exist_ok=True)
        ocp.save_checkpointables(path, {"params": params}, custom_metadata=MARK)
        write_manifest(path, take_checksums(path, own_files(path, 0)))
    except FAILURES as error:
        raise OSError(_reason(error)) from error


def can_resume(directory: str | Path, step: int) -> bool:
    """Whether a checkpoint holds an optimizer's state beside the parameters."""
    return (Path(directory) / str(step) / "optimizer").exists()


def load_params(
    directory: str | Path,
    step: int,
    abstract: Any,
    as_stored: bool = False,
    dtype: str | None = None,
) -> Any:
    """The parameters of one checkpoint, in the shapes, dtypes and shardings of `abstract`.

    Args:
      as_stored: keep the dtypes that they were stored in.
      dtype: read all into this one instead.

    Raises:
      InputError: the checkpoint cannot be read, or holds other shapes.
    """
    path = (Path(directory) / str(step)).absolute()
    try:
        stored = ocp.metadata(path, "params").metadata
        differing = differing_shapes(stored, abstract)
        if dtype is not None:
            abstract = jax.tree.map(lambda to: to.update(dtype=np.dtype(dtype)), abstract)
        elif as_stored and not differing:
            abstract = jax.tree.map(lambda to, of: to.update(dtype=of.dtype), abstract, stored)
        params = None if differing else ocp.load_checkpointables(path, {"params": abstract})
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if differing:
        raise InputError(
            f"cannot read the checkpoint {path}: {differing}; it was trained with another config"
        )
    return params["params"]


def differing_shapes(stored: Any, wanted: Any) -> str:
    """The first parameter whose shape differs between two trees of arrays, "" if none does."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in leaves
        }

    stored, wanted = shapes(stored), shapes(wanted)
    for name in sorted(stored | wanted):
        if stored.get(name) != wanted.get(name):
            return f"{name} has shape {stored.get(name)} there, and {wanted.get(name)} in the model"
    return ""


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"cannot read the checkpoint {path}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Why files could not be written or read, in a few words."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # of tensorstore, as a ValueError
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def _wait_for(folder: Path, patience: int) -> None:
    """Waits until this machine sees a folder that another has renamed; NFS may be late to.

    Raises:
      TimeoutError: it does not come.
    """
    deadline = time.monotonic() + patience
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} does not appear on this machine")
        time.sleep(0.1)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that an interruption leaves none that looks complete.

    Raises:
      FailedError: it cannot be removed.
    """
    doomed = checkpoint.with_name(checkpoint.name + DELETED)
    try:
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise FailedError(f"cannot remove the checkpoint {checkpoint}: {_reason(error)}") from error
