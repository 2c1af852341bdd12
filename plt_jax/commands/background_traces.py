"""Stack traces that libraries print in the background go to a file.

When a disk is full, orbax and tensorstore print hundreds of lines from their own threads, before
and behind the one line that says what the command could not do. Nobody who reads that line needs
them, but whoever reports an error of a library does.

What a crashing process prints (signals, native aborts) and warnings reach stderr as ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
import traceback


class _TraceFile:
    """A file for stack traces, which is made when the first one is written."""

    def __init__(self):
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def write(self, text: str) -> None:
        """Appends a text. The first one is announced on stderr. Never raises.

        A text that cannot be stored, as on a full disk, is dropped.
        """
        with self._lock, contextlib.suppress(Exception):  # a process that ends has parts missing
            if self._descriptor is None:
                self._descriptor = self._open()
            if self._descriptor >= 0:
                os.write(self._descriptor, text.encode("utf-8", "backslashreplace"))

    @staticmethod
    def _open() -> int:
        """Makes the file and says where it is. Returns its descriptor, -1 if it cannot be made."""
        try:
            descriptor, path = tempfile.mkstemp(prefix="plt_jax-traces-", suffix=".txt")
            place = f"its stack traces are in {path}"
        except OSError:
            descriptor, place = -1, "its stack traces could not be stored"
        print(f"note: something failed in the background; {place}", file=sys.stderr, flush=True)
        return descriptor


class _TraceHandler(logging.Handler):
    """Writes records to the file of stack traces."""

    def __init__(self, traces: _TraceFile):
        super().__init__()
        self._traces = traces

    def emit(self, record: logging.LogRecord) -> None:
        self._traces.write(self.format(record) + "\n")


def divert_background_traces() -> None:
    """Sends stack traces of background threads to a file from now on, until the process ends.

    These are exceptions that a thread does not catch, those that native code meets in a callback,
    and asyncio's reports of failed tasks that nobody waited for.
    """
    traces = _TraceFile()

    def write(thrown: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
        error = thrown.exc_value
        if error is not None and not isinstance(error, SystemExit):
            traces.write("".join(traceback.format_exception(error)))

    sys.unraisablehook = write  # native code's callbacks
    threading.excepthook = write
    asyncio_logger = logging.getLogger("asyncio")
    asyncio_logger.addHandler(_TraceHandler(traces))
    asyncio_logger.propagate = False
