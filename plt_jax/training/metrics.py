"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the picture of the losses."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from plt_jax.errors import FailedError
from plt_jax.files import write_text
from plt_jax.run_files import METRICS

EVENTS = "tensorboard"


class MetricsWriter:
    """Appends rows of numbers to metrics.jsonl and to TensorBoard."""

    def __init__(self, directory: Path, resumed_step: int, first_layer: int = 0):
        """Opens both, dropping what an earlier start wrote after the step that this one resumes.

        Args:
          first_layer: how many layers come before those that values by loop and layer are of.
        """
        self._directory, self._first_layer = directory, first_layer
        self._path = directory / METRICS
        self._open(resumed_step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # `write` has said so
            self._file.close()
        if self._events_are_written():
            with contextlib.suppress(OSError):
                self._tensorboard.close()

    def write(self, step: int, **values: float | list[list[float]]) -> None:
        """Writes one row; a value may be one of each loop and layer, as a list of lists.

        Numbers that are not finite are null there: JSON has no others.

        Raises:
          FailedError: it cannot be written, as on a full disk.
        """
        row = {"step": step} | {name: _finite(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise FailedError(f"cannot write {self._path}: {error.strerror}") from error
        if not self._events_are_written():
            raise FailedError(f"cannot write {self._path.with_name(EVENTS)}: see the error above")
        for name, value in values.items():
            if not isinstance(value, list):
                self._draw(name, value, step)
                continue
            for (loop, layer), one in np.ndenumerate(value):
                layer += self._first_layer
                self._draw(f"{name}/loop_{loop + 1}/layer_{layer + 1}", one, step)

    def go_back(self, step: int) -> None:
        """Drops what was written after a step, from which training goes on anew."""
        self.__exit__()
        self._open(step)

    def _open(self, step: int) -> None:
        kept = [row for row in read_metrics(self._directory) if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(self._directory / EVENTS),
            max_queue=10_000,  # more than one row's values, so that no row waits for the disk
            purge_step=step + 1 if step else None,
        )

    def _draw(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):  # TensorBoard would warn, and show nothing
            self._tensorboard.add_scalar(tag, value, step)

    def _events_are_written(self) -> bool:
        # Once tensorboardX's thread has died of an error, giving it more waits for ever.
        return self._tensorboard.file_writer.event_writer._worker.is_alive()


def _finite(value: Any) -> Any:
    """Nested values with None for numbers that are not finite."""
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value if math.isfinite(value) else None


class NoMetrics(contextlib.nullcontext):
    """Takes what MetricsWriter does, and writes nothing."""

    def __enter__(self) -> NoMetrics:
        return self

    def write(self, step: int, **values: float | list[list[float]]) -> None:
        """Writes nothing."""

    def go_back(self, step: int) -> None:
        """Drops nothing."""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line that a kill cut short is left out."""
    path = directory / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(directory: Path) -> None:
    """Draws loss.png: training and validation loss in nats per token, by step."""
    from matplotlib.figure import Figure  # slow to import, and needed once a run

    rows = read_metrics(directory)
    training = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    validation = [row for row in rows if "validation_loss" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.6, label="training")
    if validation:
        steps = [row["step"] for row in validation]
        losses = [row["validation_loss"] for row in validation]
        label = f"held-out text (last: {validation[-1]['bits_per_byte']:.3f} bits per byte)"
        axes.plot(steps, losses, "o-", color="tab:orange", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(directory.name)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
