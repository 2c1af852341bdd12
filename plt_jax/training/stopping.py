"""How several processes stop after the same step, and end together where one of them fails.

A process may be a step ahead of another. No process may take more steps than the others: its
devices would wait for theirs for ever. To ask the devices after every step would cost as much as a
small step. Instead, a thread of each process looks once a second, in the key-value store that JAX's
processes share, whether any process was told to stop. If one was, the thread stores the step that
its own process has reached, and the process does not take its next step until all have stored
theirs. The threads do not wait for devices, so that all of them answer.

A process that fails stores its message too. The others, whose devices would wait for it until JAX
aborts them, end with that message.
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
"""Numbers of the runs in a process's life, for their keys; all processes have the same runs."""


class CoordinatedStop:
    """Decides after every step whether the run stops there, the same in all processes.

    It is a context manager around everything that the processes do together.
    """

    def __init__(
        self,
        requested: Callable[[], bool],
        step: int,
        patience: int,
        index: int | None = None,
        count: int | None = None,
    ):
        """
        Args:
          requested: whether this process was told to stop. It alone decides for a single process.
          step: the step that the run starts from.
          patience: seconds to wait for the other processes.
          index, count: the index of this process, and the number of all; default: JAX's.
        """
        self._requested, self._step, self._patience = requested, step, patience
        self._index = jax.process_index() if index is None else index
        self._count = jax.process_count() if count is None else count
        self._key = f"stop/{next(_numbers)}"
        self._condition = threading.Condition()
        self._closed = threading.Event()
        self._agreeing = False
        self._last: int | None = None
        self._error: MissingProcessError | None = None
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)

    def __enter__(self) -> CoordinatedStop:
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
            time.sleep(2 * POLL_SECONDS)  # until the others have read it: process 0 holds the store

    def should_stop(self, step: int) -> bool:
        """Whether the run ends with this step; the answer is the same in all processes.

        Args:
          step: number of steps computed since step 0, which rollbacks do not lower.

        Raises:
          MissingProcessError: a process was told to stop, and another does not answer.
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
            last = self._agree_on_last_step()
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

    def _agree_on_last_step(self) -> int | None:
        """The step to end with, after which no process has begun another; None if the run is
        over."""
        # It is stored at the end of the run too, since other processes may wait for it.
        processes.put(f"{self._key}/step/{self._index}", str(self._step))
        steps = []
        for index in range(self._count):
            waited = 0.0
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
