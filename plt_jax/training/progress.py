"""The progress of training: a bar on a terminal, plain lines elsewhere; and its speed."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressReport:
    """Shows the progress of a run's steps. It is a context manager."""

    def __init__(self, start: int, total: int):
        self._start, self._total, self._began = start, total, time.monotonic()
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=total, completed=start, numbers="")

    def __enter__(self) -> ProgressReport:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False)

    def advance(
        self, step: int, loss: float, bits_per_byte: float, tokens_per_second: float
    ) -> None:
        """Shows the numbers of a step."""
        numbers = (
            f"loss {loss:.3f}  {bits_per_byte:.3f} bits/byte  {tokens_per_second:,.0f} tokens/s"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        pace = (time.monotonic() - self._began) / max(step - self._start, 1)
        left = pace * (self._total - step)
        self.say(f"step {step}/{self._total}  {numbers}  {left / 60:.1f} min left")


class Speedometer:
    """Measures tokens per second of training steps; pauses and the first step, which compiles, do
    not count."""

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._step, self._since, self._rates = 0, 0.0, []
        self.started = False

    def start(self, step: int) -> None:
        """Starts counting after a step."""
        self.started, self._step, self._since = True, step, time.monotonic()

    def mark(self, step: int) -> float:
        """Tokens per second since the last call; 0 if no step was taken since."""
        now = time.monotonic()
        tokens = (step - self._step) * self._tokens_per_step
        rate = tokens / (now - self._since) if tokens else 0.0
        self._step, self._since = step, now
        if tokens:
            self._rates.append(rate)
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of a block out."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def median(self) -> float:
        """The median of all values that `mark` has returned; 0 without one."""
        return statistics.median(self._rates) if self._rates else 0.0


def peak_memory() -> int:
    """Peak memory in bytes: that of the first device if it keeps count, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
