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
        self._lock = threading.RLock()
        self._writing = False
        self._waiting: list[str] = []
        self._descriptor: int | None = None

    def write(self, text: str) -> None:
        """Appends a text. The first one is announced on stderr. Never raises.

        A text that cannot be stored, as on a full disk, is dropped.
        """
        with self._lock, contextlib.suppress(Exception):  # a process that ends has parts missing
            self._waiting.append(text)
            if self._writing:
                return  # a destructor has failed while this thread wrote, which goes on below
            self._writing = True
            try:
                while self._waiting:
                    self._append(self._waiting.pop(0))
            finally:
                self._writing = False

    def _append(self, text: str) -> None:
        if self._descriptor is not None:
            _store(self._descriptor, text)
            return
        self._descriptor, place = -1, "its stack traces could not be stored"
        with contextlib.suppress(OSError):
            self._descriptor, path = tempfile.mkstemp(prefix="plt_jax-traces-", suffix=".txt")
            if _store(self._descriptor, text):
                place = f"its stack traces are in {path}"
        if sys.stderr is not None:
            print(f"note: something failed in the background; {place}", file=sys.stderr, flush=True)


def _store(descriptor: int, text: str) -> bool:
    """Writes a text to a file, of -1 nowhere; returns whether all of it is stored."""
    content = text.encode("utf-8", "backslashreplace")
    try:
        return descriptor != -1 and os.write(descriptor, content) == len(content)
    except OSError:
        return False


def divert_background_traces() -> None:
    """Sends stack traces of background threads to a file from now on, until the process ends.

    These are exceptions that a thread does not catch, those that native code and destructors meet,
    and asyncio's reports of failed tasks that nobody waited for.
    """
    traces = _TraceFile()

    def write(error: BaseException | None, where: str) -> None:
        if error is not None and not isinstance(error, SystemExit):
            traces.write("".join([where, "\n", *traceback.format_exception(error)]))

    def write_of_thread(failed: threading.ExceptHookArgs) -> None:
        write(failed.exc_value, f"in thread {failed.thread.name if failed.thread else 'unknown'}:")

    def write_of_callback(failed: sys.UnraisableHookArgs) -> None:
        write(failed.exc_value, f"{failed.err_msg or 'ignored in'} {failed.object!r}:")

    def is_no_failure(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        traces.write(logging.Formatter().format(record) + "\n")
        return False

    threading.excepthook = write_of_thread
    sys.unraisablehook = write_of_callback
    logging.getLogger("asyncio").addFilter(is_no_failure)
