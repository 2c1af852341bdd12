"""Traces a window of steps, for TensorBoard's Profile page, Perfetto or XProf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

FAILURES = (OSError, RuntimeError)
"""What JAX's profiler raises where another profiler is running, or a file cannot be written."""


class ProfileWindow:
    """Traces `steps` steps of a run, from `first` on.

    It is a context manager, which ends the window early if the run stops within it. Errors of the
    profiler are printed, and do not end the run.
    """

    def __init__(self, directory: Path, first: int | None, steps: int, say: Callable[[str], None]):
        """
        Args:
          directory: where the trace goes, under plugins/profile.
          first: the first step; None for no window.
          steps: number of steps.
          say: prints a line.
        """
        self._directory, self._first, self._steps, self._say = directory, first, steps, say
        self._tracing = False

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self.end()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Names the call of one step in the trace; begins the window if it is its first."""
        if number == self._first:
            self._begin()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Whether a step is the last of the window; False outside of it."""
        if self._first is None:
            return False
        return self._tracing and number >= self._first + self._steps - 1

    def end(self) -> None:
        """Ends the window. Its last step must have been computed."""
        self._tracing = False
        try:
            jax.profiler.stop_trace()
            self._say(f"the profile is in {self._directory}; TensorBoard shows it")
        except FAILURES as error:
            self._say(f"no profile: {error}")

    def _begin(self) -> None:
        try:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        except FAILURES as error:
            self._say(f"no profile: {error}")
