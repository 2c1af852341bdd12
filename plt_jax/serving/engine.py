"""The engine: a scheduler in a thread of its own, which waits while there is nothing to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from plt_jax.serving.request import Finish, Request
from plt_jax.serving.scheduler import Scheduler


class EngineStoppedError(Exception):
    """The engine takes no requests any more."""


class Engine:
    """Runs a scheduler; all methods may be called from any thread."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.on_failure: Callable[[], None] = lambda: None
        """Is called when an error has ended the thread."""
        self.failure: BaseException | None = None
        """What ended the thread, if it was an error."""
        self._wake = threading.Condition()
        self._accepts, self._stops_at = True, float("inf")
        self._thread = threading.Thread(target=self._run, name="plt_jax engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._accepts and self.failure is None

    def submit(self, requests: Sequence[Request]) -> None:
        """Lets requests wait for slots, all or none of them.

        Raises:
          InputError: one does not fit.
          QueueFullError: too many wait.
          EngineStoppedError: no requests are taken any more.
        """
        with self._wake:
            if not self.is_alive:
                raise EngineStoppedError
            self.scheduler.submit(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request, wherever it is; nothing if it has ended."""
        self.scheduler.cancel(request)

    def stop(self, within: float) -> None:
        """Takes no more requests, and ends those that are there after `within` seconds at most."""
        with self._wake:
            self._accepts, self._stops_at = False, time.monotonic() + within
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self.scheduler.tick()
        except BaseException as error:
            with self._wake:  # so that nobody submits behind the end
                self.failure = error
            try:
                self.scheduler.end(Finish.FAILED)
            finally:
                self.on_failure()
        else:
            self.scheduler.end(Finish.SHUTDOWN)

    def _wait(self) -> bool:
        """Waits until there is something to do; returns whether there is before the end."""
        with self._wake:
            while self._accepts and self.scheduler.is_idle:
                self._wake.wait()
        return not self.scheduler.is_idle and time.monotonic() < self._stops_at
