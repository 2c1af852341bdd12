"""Writes the metrics of a run to metrics.jsonl, and hands them to trackers that draw them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from plt_jax.errors import FailedError
from plt_jax.files.writing import to_json, write_text
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import METRICS
from plt_jax.training.trackers import Tracker

Values = float | list[float] | list[list[float]]
"""A number, a number for each loop, or a number for each loop and layer."""


class MetricsWriter:
    """Appends rows of numbers to metrics.jsonl and hands them to trackers."""

    def __init__(
        self,
        directory: Path,
        resumed_step: int,
        trackers: Sequence[Tracker] = (),
        firsts: Mapping[str, tuple[int, ...]] | None = None,
    ):
        """Opens the file, and drops the rows that an earlier start wrote after `resumed_step`.

        Args:
          directory: the folder of the run's logs.
          resumed_step: the step that this start goes on from.
          trackers: where numbers are drawn; they are closed with this writer.
          firsts: the numbers of the first loop and the first layer of values by loop and layer, by
            metric, where they are not 1.
        """
        self._directory, self._path = directory, directory / METRICS
        self._trackers, self._firsts = trackers, firsts or {}
        self._open(resumed_step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def write(self, step: int, **values: Values) -> None:
        """Writes one row, with the time in seconds since 1970.

        Numbers that are not finite become null, since JSON has none.

        Raises:
          FailedError: the file cannot be written, for example on a full disk.
        """
        row = {"step": step, "time": round(time.time(), 3)}
        try:
            self._file.write(to_json(row | values) + "\n")
            self._file.flush()
        except OSError as error:
            raise FailedError(f"cannot write {self._path}: {error.strerror}") from error
        scalars = dict(self._scalars(values))
        for tracker in self._trackers:
            tracker.draw(step, scalars)

    def rewind(self, step: int) -> None:
        """Drops the rows after a step that training was rolled back to."""
        self._close()
        self._open(step)
        for tracker in self._trackers:
            tracker.rewind(step)

    def _open(self, step: int) -> None:
        kept = [row for row in read_metrics(self._directory) if row["step"] <= step]
        write_text(self._path, "".join(to_json(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has raised the error already
            self._file.close()

    def _scalars(self, values: Mapping[str, Values]) -> Iterator[tuple[str, float]]:
        """The finite numbers; those of loops and layers are named NAME/loop_2/layer_1."""
        for name, value in values.items():
            firsts = self._firsts.get(name, (1, 1))
            for index, one in np.ndenumerate(value):
                places = zip(("loop", "layer"), firsts, index, strict=False)
                tag = "/".join([name, *(f"{axis}_{first + at}" for axis, first, at in places)])
                if math.isfinite(one):  # trackers warn of others, and do not draw them
                    yield tag, float(one)


class NoMetrics(contextlib.nullcontext):
    """A MetricsWriter that writes nothing, for all processes but the first."""

    def __enter__(self) -> NoMetrics:
        return self

    def write(self, step: int, **values: Values) -> None:
        """Writes nothing."""

    def rewind(self, step: int) -> None:
        """Drops nothing."""
