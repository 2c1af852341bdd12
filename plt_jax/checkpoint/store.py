"""Writing and reading checkpoints, by orbax (orbax_settings.py says how).

A checkpoint is a folder named by its step. It holds the parameters, the optimizer's state and the
data iterator's state, so that evaluation can read the parameters alone and training can resume
exactly. On a disk it is first written under another name, and gets its own name after its manifest
(see manifest.py): a folder whose name is a number is complete. In a bucket, where nothing can be
renamed, it has its name from the beginning, and is complete when it has its manifest.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from plt_jax.buckets.address import is_in_bucket
from plt_jax.checkpoint.manifest import (
    MANIFEST,
    MARK,
    File,
    own_files,
    take_checksums,
    validation_loss,
    write_manifest,
)
from plt_jax.checkpoint.orbax_settings import (
    FAILURES,
    UNREADABLE,
    bucket_errors,
    loading,
    reason,
    saving,
    unreadable,
)
from plt_jax.checkpoint.retention import reasons_to_keep
from plt_jax.checkpoint.steps import is_complete, is_step, list_steps
from plt_jax.config import CheckpointConfig
from plt_jax.distributed import processes
from plt_jax.errors import FailedError
from plt_jax.files.folders import remove_tree
from plt_jax.files.paths import is_folder, to_path

UNFINISHED, DELETED = ".unfinished", ".deleted"
_LEFTOVER = re.compile(rf"\d+({UNFINISHED}|{DELETED}|\.orbax-checkpoint-tmp).*")
_numbers = itertools.count()
"""Numbers of saves, for the keys under which processes exchange checksums."""


class Checkpoints:
    """Saves the checkpoints of one run in the background, and restores them.

    It is a context manager, which waits for the last save at its end.
    """

    def __init__(
        self,
        directory: str | Path,
        config: CheckpointConfig,
        patience: int = 300,
        claim: Callable[[], None] = lambda: None,
    ):
        """Removes what an interrupted save or removal has left in the directory.

        Args:
          directory: the folder of the checkpoints.
          config: which checkpoints are kept.
          patience: seconds that a save waits for the checksums of other processes.
          claim: raises FailedError where another process has taken over the directory; process 0
            calls it before it completes or removes a checkpoint.
        """
        self._directory, self._config = to_path(directory).absolute(), config
        self._patience, self._claim = patience, claim
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[Path, Future] | None = None
        if processes.is_first() and is_folder(self._directory):
            for entry in self._directory.iterdir():
                if _is_leftover(entry):
                    with suppress(OSError):
                        remove_tree(entry)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        try:
            self.wait()
        except FailedError as failed:
            if error is None:
                raise
            print(f"error: {failed}", file=sys.stderr, flush=True)  # the first error is raised
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
        """Waits for the save before, begins this one, and returns when the arrays are copied.

        Args:
          step: the newest step.
          params, optimizer: trees of arrays, which are stored apart from each other.
          data: the data iterator's state after the step's batch, the same in all processes.
          validation_loss: nats per token; the checkpoints of lowest loss are kept longest.

        Raises:
          FailedError: this save cannot begin, or the save before has failed.
        """
        self.wait()
        final = self._directory / str(step)
        unfinished = final
        if not is_in_bucket(final):
            unfinished = final.with_name(final.name + UNFINISHED)
        trees = {"params": params, "optimizer": optimizer, "data": data}
        try:
            with saving(trees), bucket_errors(final):
                path = str(unfinished)
                response = ocp.save_checkpointables_async(path, trees, custom_metadata=MARK)
        except FAILURES as error:
            raise self._failed(final, error) from error
        complete = (response, unfinished, final, validation_loss, next(_numbers))
        self._saving = final, self._thread.submit(self._complete, *complete)

    def wait(self) -> None:
        """Waits until a save under way is complete.

        Raises:
          FailedError: the save has failed, or a checkpoint that is not kept cannot be removed.
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
        """The parameters, the optimizer's state, and the data iterator's state of a checkpoint.

        Args:
          step: the checkpoint's step.
          params, optimizer: trees of abstract arrays, whose shapes, dtypes and shardings the result
            has.

        Raises:
          InputError: the checkpoint cannot be read.
        """
        path = self._directory / str(step)
        if not processes.is_single():
            _wait_for(path, self._patience)
        wanted = {"params": params, "optimizer": optimizer, "data": None}
        # Earlier versions stored the data iterator's state as a file of one process.
        earlier = path / "data" / "process_0-of-1.json"
        if earlier.exists():
            del wanted["data"]
        try:
            with bucket_errors(path):
                stored = [
                    ocp.metadata(str(path), name).metadata for name in ("params", "optimizer")
                ]
                with loading(stored, [params, optimizer]):
                    restored = ocp.load_checkpointables(str(path), wanted)
            data = restored.get("data") or json.loads(earlier.read_text(encoding="utf-8"))
        except UNREADABLE as error:
            raise unreadable(path, error) from error
        return restored["params"], restored["optimizer"], data

    def _complete(
        self,
        response: Any,
        unfinished: Path,
        final: Path,
        loss: float | None,
        number: int,
    ) -> None:
        """Waits until all files are written, adds the manifest, gives the checkpoint its name, and
        removes the checkpoints that are no longer kept."""
        with bucket_errors(final):
            response.result()
        files = _gather_checksums(unfinished, number, self._patience)
        if files is None:
            return
        self._claim()
        write_manifest(unfinished, files, loss)
        if unfinished != final:
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
        return FailedError(f"cannot save the checkpoint {final}: {reason(error)}; {last}")


def save_params(directory: str | Path, step: int, params: Any, patience: int = 300) -> None:
    """Writes a checkpoint of parameters alone.

    With several processes all must call it, and each writes what its devices hold. It is complete
    when the first process returns.

    Args:
      patience: seconds that processes wait for one another.

    Raises:
      OSError: the checkpoint cannot be written.
    """
    path = (to_path(directory) / str(step)).absolute()
    try:
        if processes.is_first():
            path.parent.mkdir(exist_ok=True)
        processes.barrier("the folder of the checkpoint is made", patience)
        trees = {"params": params}
        with saving(trees), bucket_errors(path):
            ocp.save_checkpointables(str(path), trees, custom_metadata=MARK)
        files = _gather_checksums(path, next(_numbers), patience)
        if files is not None:
            write_manifest(path, files)
    except FAILURES as error:
        raise OSError(reason(error)) from error


def _gather_checksums(checkpoint: Path, number: int, patience: int) -> dict[str, File] | None:
    """The files of a checkpoint with their checksums, for which each process reads what it has
    written; None in processes other than the first.

    Args:
      number: that of the save, the same in all processes.
    """
    _wait_for(checkpoint, patience)
    own = take_checksums(checkpoint, own_files(checkpoint, jax.process_index()))
    gathered = processes.gather(f"checksums/{number}", json.dumps(own), patience)
    if not processes.is_first():
        return None
    return {name: File(*file) for text in gathered for name, file in json.loads(text).items()}


def can_resume(directory: str | Path, step: int) -> bool:
    """Whether a checkpoint holds an optimizer's state, which resuming needs."""
    return (to_path(directory) / str(step) / "optimizer").exists()


def _is_leftover(entry: Path) -> bool:
    """Whether an entry of the folder of checkpoints is what an interrupted save or removal left."""
    if is_step(entry.name):
        return not is_complete(entry)
    return _LEFTOVER.fullmatch(entry.name) is not None


def _wait_for(folder: Path, patience: int) -> None:
    """Waits until this machine sees a folder that another one has renamed; NFS may be slow.

    Raises:
      TimeoutError: the folder does not appear within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} does not appear on this machine")
        time.sleep(0.1)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; an interruption does not leave a half that looks complete.

    Raises:
      FailedError: the checkpoint cannot be removed.
    """
    doomed = checkpoint
    try:
        if is_in_bucket(checkpoint):
            (checkpoint / MANIFEST).unlink(missing_ok=True)
        else:
            doomed = checkpoint.with_name(checkpoint.name + DELETED)
            checkpoint.rename(doomed)
        remove_tree(doomed)
    except OSError as error:
        raise FailedError(f"cannot remove the checkpoint {checkpoint}: {reason(error)}") from error
