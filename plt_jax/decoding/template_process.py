"""The process that renders chat templates, and its limits of time and memory.

A template comes with a model, from anyone. Jinja's sandbox keeps it from files and from Python's
internals, but not from computing for ever, so it runs in a process that can be ended.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plt_jax.errors import InputError, one_line

SECONDS = 10.0
"""How long a template may compute."""
START_SECONDS = 60.0
"""How long the process may take to start; it is a tenth of a second on an idle machine."""
MEMORY_BYTES = 2**30
"""Address space of the process, on Linux."""
MOST_CHARACTERS = 2**24
"""Characters of the longest text that a template may make."""

_SANDBOX = Path(__file__).with_name("template_sandbox.py")
_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "TZ", "LANG", "LC_ALL")
"""The environment variables that the process gets. Keys and tokens are none of its business."""


class ChatRefusedError(InputError):
    """A template refuses messages, as some do with those of the system."""


class TemplateProcess:
    """Renders templates, one at a time, in a process that starts when it is needed first.

    Where a template breaks a limit, the process is ended, and the next template gets a new one.
    Several threads may use it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text that a template makes.

        Args:
          source: the template.
          variables: values by name, of the types that JSON has.

        Raises:
          ChatRefusedError: the template refuses the values.
          InputError: a value is of another type; the template fails, or breaks a limit; or
            templates of other threads take too long.
        """
        try:
            request = json.dumps({"source": source, "variables": variables})
        except RecursionError as error:
            raise ChatRefusedError(
                "the chat template refuses the messages: they are too deeply nested"
            ) from error
        except (TypeError, ValueError) as error:
            raise InputError(f"the messages hold what JSON cannot: {error}") from error
        if not self._lock.acquire(timeout=SECONDS):
            raise InputError("the chat templates of other requests take too long; try again")
        try:
            answer = self._ask(request.encode("ascii") + b"\n")
        finally:
            self._lock.release()
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise ChatRefusedError(f"the chat template refuses the messages: {answer['refused']}")
        raise InputError(f"the chat template is broken: {answer['broken']}")

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what it has not read
                pipe.close()

    def _ask(self, request: bytes) -> dict[str, str]:
        """Sends a line and reads one; ends the process if that takes too long."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._start()
        line, late = self._exchange(request, SECONDS)
        if line:
            return json.loads(line)
        limit = f"for more than {SECONDS:g} seconds" if late else "until its process ends"
        raise InputError(f"the chat template is broken: it computes {limit}")

    def _start(self) -> None:
        """Starts the process.

        Raises:
          InputError: it does not start.
        """
        limits = [str(MEMORY_BYTES), str(MOST_CHARACTERS), str(SECONDS)]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SANDBOX), *limits],  # -P: files beside it, no modules
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
                start_new_session=True,  # Ctrl-C lets the chats of a server end
            )
            line, _ = self._exchange(b"", START_SECONDS)
            if not line:
                errors.seek(0)
                *_, last = [b"it says nothing", *errors.read().splitlines()]
                reason = one_line(last.decode("utf-8", "replace"))
                raise InputError(f"the process of chat templates does not start: {reason}")

    def _exchange(self, request: bytes, seconds: float) -> tuple[bytes, bool]:
        """Writes a request, and reads a line of the process.

        Returns:
          The line, and whether it took too long. Without a whole line it is empty, and the process
          is ended, so that no later request gets an answer to this one.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer, line = threading.Timer(seconds, end), b""
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
            timer.join()  # or it could end the process during the next request
            whole = line.endswith(b"\n")
            if late.is_set() or not whole:
                self.close()
        return line if whole else b"", late.is_set()


@functools.cache
def template_process() -> TemplateProcess:
    """The one that all templates share; it ends with this process."""
    process = TemplateProcess()
    atexit.register(process.close)
    return process
