"""Trackers, which draw a run's metrics: TensorBoard and, on request, Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from plt_jax.errors import FailedError, InputError

EVENTS, WANDB = "tensorboard", "wandb"
"""The trackers' folders in a run directory."""
WANDB_RUN = f"{WANDB}/run_id"
"""The file that names the run of Weights & Biases."""


class Tracker(Protocol):
    """Takes the scalars of steps."""

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        """Takes finite numbers by name.

        Raises:
          FailedError: they cannot be written, for example on a full disk.
        """

    def rewind(self, step: int) -> None:
        """Prepares for steps after this one that are taken again."""

    def close(self, failed: bool) -> None:
        """Writes what is still buffered.

        Args:
          failed: whether an error ends the run.
        """


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, directory: Path, step: int):
        """Opens a new event file, and hides the steps that an earlier start drew after `step`."""
        self._directory, self._lost = directory / EVENTS, False
        self._files = itertools.count()
        self._open(step)

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        """Draws the scalars; events are a convenience, so what fails is said and passed over."""
        if not self._is_alive() and not self._begin_again(step):
            return
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self.close(failed=False)
        self._open(step)

    def _begin_again(self, step: int) -> bool:
        """Opens a new file where the thread of the old one has ended; returns whether it could."""
        if self._lost:
            return False
        print(
            f"note: the thread that writes {self._directory} has ended, because a disk is full or "
            f"the clock was set back; step {step} begins a new file",
            file=sys.stderr,
            flush=True,
        )
        try:
            self._open(step - 1)
        except OSError as error:
            self._lost = True
            print(f"note: {self._directory} gets no more events: {error}", file=sys.stderr)
        return not self._lost

    def close(self, failed: bool) -> None:
        if self._is_alive():
            with contextlib.suppress(OSError):
                self._writer.close()

    def _open(self, step: int) -> None:
        self._writer = SummaryWriter(
            str(self._directory),
            max_queue=10_000,  # more than one row's values, so that no row waits for the disk
            flush_secs=10,
            purge_step=step + 1 if step else None,
            filename_suffix=f".{next(self._files)}",  # two files of a second have one name
        )

    def _is_alive(self) -> bool:
        # Once tensorboardX's thread has died of an error, giving it more waits for ever.
        file_writer: Any = self._writer.file_writer
        return file_writer.event_writer._worker.is_alive()


class WeightsAndBiases:
    """One run of Weights & Biases for all starts of a run. The account, the server and the mode
    (WANDB_MODE=offline) come from the settings of Weights & Biases."""

    def __init__(self, directory: Path, project: str, config: dict[str, Any]):
        """Begins the run, or goes on with the one that an earlier start began.

        Raises:
          FailedError: it cannot begin, for example without a network or an account.
        """
        import wandb  # pyright: ignore[reportMissingImports] - an optional package

        identity = directory / WANDB_RUN
        known = identity.read_text(encoding="utf-8").strip() if identity.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                dir=str(directory),
                config=config,
                id=known,
                resume="allow",
                settings=wandb.Settings(console="off"),  # the progress bar is not for its log
            )
            # Steps that are taken again after a resume replace the others. The step counter of
            # Weights & Biases would refuse them, since it only grows.
            self._run.define_metric("*", step_metric="step")
        except wandb.Error as error:
            raise FailedError(
                f"Weights & Biases does not begin: {' '.join(str(error).split())}; set "
                "WANDB_MODE=offline, or training.wandb_project to null"
            ) from error
        identity.parent.mkdir(exist_ok=True)
        identity.write_text(self._run.id + "\n", encoding="utf-8")

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def rewind(self, step: int) -> None:
        """Does nothing: steps that are drawn again replace the others."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def check_wandb(project: str | None) -> None:
    """Raises InputError if a project is named, but the package wandb is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"training.wandb_project is {project}, which needs a package that is not installed: "
            "pip install 'plt_jax[wandb]'"
        )
