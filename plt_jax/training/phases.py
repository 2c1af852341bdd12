"""What a run is doing, for how long, and which of it hangs."""

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
_DOING = {
    STEPS: "computing steps",
    DATA: "waiting for data",
    EVALUATION: "evaluating",
    SAVING: "saving",
    COMPILING: "compiling",
    PROFILING: "writing the profile",
    STARTING: "starting or ending",
}


class Phases:
    """Keeps time of what a run does, one thing at a time; a thread says so where one takes long.

    Enter it as a context manager; outside of any phase the run is starting, or ending.
    """

    def __init__(self, hang_after: float | None):
        """Starts the clock.

        Args:
          hang_after: seconds in one phase after which, and again whenever as many more have gone
            by, a line on stderr says which it is; None never.
        """
        self._hang_after = hang_after
        self._phase, self._since, self._step = STARTING, time.monotonic(), 0
        self._seconds: dict[str, float] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

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
        """A stretch of time that is spent on something else than what is around it."""
        before = self._phase
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(before)

    def reached(self, step: int) -> None:
        """Steps up to this one are computed; what follows starts anew."""
        self._step = step
        self._turn_to(self._phase)

    def seconds(self) -> dict[str, float]:
        """By phase, so far."""
        self._turn_to(self._phase)
        return dict(self._seconds)

    def _turn_to(self, name: str) -> None:
        with self._changed:
            now = time.monotonic()
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
            self._phase, self._since = name, now
            self._changed.notify()

    def _watch(self) -> None:
        said = 0.0
        with self._changed:
            while not self._ended:
                since = max(self._since, said)
                left = max(since + self._hang_after - time.monotonic(), 0.01)
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
                now = time.monotonic()
                if not self._ended and now - max(self._since, said) >= self._hang_after:
                    said = now
                    print(
                        f"{_DOING[self._phase]} has taken {now - self._since:.0f} s, after step "
                        f"{self._step}, and goes on",
                        file=sys.stderr,
                        flush=True,
                    )
