"""Where a run's numbers are drawn: TensorBoard and, on request, Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from plt_jax.errors import FailedError, InputError

EVENTS, WANDB = "tensorboard", "wandb"
"""Their folders in a run directory."""


class Tracker(Protocol):
    """Takes the scalars of steps."""

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        """Takes finite numbers by name.

        Raises:
          FailedError: it cannot, as on a full disk.
        """

    def go_back(self, step: int) -> None:
        """Steps behind this one come anew."""

    def close(self, failed: bool) -> None:
        """Writes what it still holds; `failed` says that an error ends the run."""


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, directory: Path, step: int):
        """Hides what an earlier start drew behind the step that this one resumes."""
        self._directory = directory / EVENTS
        self._open(step)

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        if not self._is_alive():
            raise FailedError(f"cannot write {self._directory}: see the error above")
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def go_back(self, step: int) -> None:
        self.close(failed=False)
        self._open(step)

    def close(self, failed: bool) -> None:
        if self._is_alive():
            with contextlib.suppress(OSError):
                self._writer.close()

    def _open(self, step: int) -> None:
        self._writer = SummaryWriter(
            str(self._directory),
            max_queue=10_000,  # more than one row's values, so that no row waits for the disk
            purge_step=step + 1 if step else None,
        )

    def _is_alive(self) -> bool:
        # Once tensorboardX's thread has died of an error, giving it more waits for ever.
        return self._writer.file_writer.event_writer._worker.is_alive()


class WeightsAndBiases:
    """One run there for all starts of a run here. Its account, server and mode (WANDB_MODE=offline)
    come from its own settings."""

    def __init__(self, directory: Path, project: str, config: dict[str, Any]):
        """Begins it, or goes on with the one that an earlier start began.

        Raises:
          FailedError: it does not begin, as without a network or an account.
        """
        import wandb

        identity = directory / WANDB / "run_id"
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
            # Steps that are taken again after a resumption are drawn over the others: its own count
            # of steps would refuse them.
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

    def go_back(self, step: int) -> None:
        """Nothing: what is drawn anew has the same steps."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def check_wandb(project: str | None) -> None:
    """Raises InputError where a project is named and the package is not there."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"training.wandb_project is {project}, which needs a package that is not installed: "
            "pip install 'plt_jax[wandb]'"
        )
