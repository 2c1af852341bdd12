"""The phases of a run: how long each takes, and a warning where one hangs."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

STEPS, DATA, EVALUATION, SAVING, COMPILING, PROFILING, STARTING = (
    "steps",
    "data",
    "evaluation",
    "saving",
    "compiling",
    "profiling",
    "starting",
)
_DESCRIPTIONS = {
    STEPS: "computing steps",
    DATA: "waiting for data",
    EVALUATION: "evaluating",
    SAVING: "saving",
    COMPILING: "compiling",
    PROFILING: "writing the profile",
    STARTING: "starting or ending",
}


class Phases:
    """Times the phases of a run, one at a time; a thread prints a line where one takes long.

    It is a context manager. Outside of any phase the run is in `STARTING`.
    """

    def __init__(self, hang_after: float | None):
        """Starts the clock.

        Args:
          hang_after: seconds in one phase after which a line on stderr names it, and again after
            every such interval; None for never.
        """
        self._hang_after = hang_after
        self._phase, self._since, self._step = STARTING, time.monotonic(), 0
        self._seconds: dict[str, float] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, args=(hang_after,), daemon=True)

    def __enter__(self) -> Phases:
        if self._hang_after is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as a phase; afterwards the phase around it goes on."""
        before = self._phase
        self._switch_to(name)
        try:
            yield
        finally:
            self._switch_to(before)

    def finish_step(self, step: int) -> None:
        """Records that a step is done, and restarts the clock of `hang_after`."""
        self._step = step
        self._switch_to(self._phase)

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each phase so far, by name."""
        self._switch_to(self._phase)
        return dict(self._seconds)

    def _switch_to(self, name: str) -> None:
        with self._changed:
            now = time.monotonic()
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
            self._phase, self._since = name, now
            self._changed.notify()

    def _watch(self, hang_after: float) -> None:
        warned = 0.0
        with self._changed:
            while not self._ended:
                since = max(self._since, warned)
                left = max(since + hang_after - time.monotonic(), 0.01)
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
                now = time.monotonic()
                if not self._ended and now - max(self._since, warned) >= hang_after:
                    warned = now
                    print(
                        f"{_DESCRIPTIONS[self._phase]} has taken {now - self._since:.0f} s, after "
                        f"step {self._step}, and goes on",
                        file=sys.stderr,
                        flush=True,
                    )
