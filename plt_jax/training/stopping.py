"""How several processes, of which one was told to stop or has failed, end together.

Each may be a step ahead of another, and must not go beyond the step at which the others end: their
devices would wait for it for ever. Asking the devices after every step would cost as much as a
small step. So a thread of each process looks once a second, in the store through which JAX's
processes find one another, whether any of them was told to stop. If so it tells the others which
step its own process has reached, and the process waits with its next step until all have told.
The threads wait for no device, so all of them answer.

A process that fails says so there too: the others, whose devices would wait for it until JAX
aborts them, end with its message.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable

import jax

from plt_jax.distributed import processes
from plt_jax.errors import EXIT_FAILED, MissingProcessError

POLL_SECONDS = 1.0
_numbers = itertools.count()
"""Of the runs in a process's life, for their keys; all processes have the same runs."""


class StopTogether:
    """Decides after every step whether the run stops there; a context manager around all that
    processes do together."""

    def __init__(
        self,
        requested: Callable[[], bool],
        step: int,
        patience: int,
        index: int | None = None,
        count: int | None = None,
    ):
        """Of one process alone, `requested` decides.

        Args:
          requested: whether this process was told to stop.
          step: the one that the run starts from.
          patience: seconds to wait for the other processes.
          index, count: which process this is, and of how many; default as JAX has it.
        """
        self._requested, self._step, self._patience = requested, step, patience
        self._index = jax.process_index() if index is None else index
        self._count = jax.process_count() if count is None else count
        self._key = f"stop/{next(_numbers)}"
        self._condition = threading.Condition()
        self._closed = threading.Event()
        self._agreeing, self._last = False, None
        self._error: MissingProcessError | None = None
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)

    def __enter__(self) -> StopTogether:
        if self._count > 1:
            self._thread.start()
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        self._closed.set()
        if self._count == 1:
            return
        self._thread.join()
        if isinstance(error, Exception) and not isinstance(error, MissingProcessError):
            processes.put(f"{self._key}/failed/{self._index}", f"{error}")
            time.sleep(2 * POLL_SECONDS)  # until the others have seen it: the first keeps it

    def after(self, step: int) -> bool:
        """Whether the run ends with this step; of several processes all are told the same.

        Args:
          step: counted on where a run goes back to an earlier one.

        Raises:
          MissingProcessError: one was told to stop, and another does not answer.
        """
        if self._count == 1:
            return self._requested()
        with self._condition:
            self._condition.wait_for(lambda: not self._agreeing)
            if self._error is not None:
                raise self._error
            self._step = step
            return self._last is not None and step >= self._last

    def _watch(self) -> None:
        notice = f"{self._key}/notice"
        try:
            while not self._closed.wait(POLL_SECONDS):
                self._end_with_others()
                if self._requested():
                    processes.put(notice, "")
                if processes.get(notice) is not None:
                    break
            with self._condition:
                self._agreeing = True
            last = self._agree()
        except MissingProcessError as error:
            last, self._error = None, error
        with self._condition:
            self._last, self._agreeing = last, False
            self._condition.notify_all()
        with contextlib.suppress(MissingProcessError):
            while not self._closed.wait(POLL_SECONDS):
                self._end_with_others()

    def _end_with_others(self) -> None:
        """Ends this process where another has failed."""
        for index, message in processes.get_all(f"{self._key}/failed").items():
            line = " ".join(message.split())
            print(f"error: process {index} of {self._count}: {line}", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)  # the main thread may be waiting for the device

    def _agree(self) -> int | None:
        """The step to end with: no process has begun the one behind it. None if the run is over."""
        # Also at the end of the run, since others may be waiting for it.
        processes.put(f"{self._key}/step/{self._index}", str(self._step))
        steps = []
        for index in range(self._count):
            waited = 0
            while (text := processes.get(f"{self._key}/step/{index}")) is None:
                if self._closed.wait(POLL_SECONDS / 4):
                    return None
                waited += POLL_SECONDS / 4
                if waited > self._patience:
                    raise MissingProcessError(
                        f"process {index} of {self._count} does not say where it stops, for "
                        f"{self._patience} s; look at its output, or raise processes.timeout"
                    )
            steps.append(int(text))
        return max(steps) + 1
