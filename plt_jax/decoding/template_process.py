"""The process that renders chat templates, and its limits of time and memory.

A template comes with a model, from anyone. Jinja's sandbox keeps it from files and from Python's
internals, but not from computing for ever, so it runs in a process that can be ended.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plt_jax.errors import InputError

SECONDS = 10.0
"""How long a template may compute, the start of its process included."""
MEMORY_BYTES = 2**30
"""Address space of the process."""
MOST_CHARACTERS = 2**24
"""Characters of the longest text that a template may make."""

_SANDBOX = Path(__file__).with_name("template_sandbox.py")


class ChatRefusedError(InputError):
    """A template refuses messages, as some do with those of the system."""


class TemplateProcess:
    """Renders templates, one at a time, in a process that starts when it is needed first.

    The process ends with this one. Where a template breaks a limit, the process is ended, and the
    next template gets a new one. Several threads may use it.
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
          InputError: the template fails, or breaks a limit.
        """
        try:
            request = json.dumps({"source": source, "variables": variables})
        except RecursionError as error:
            raise ChatRefusedError(
                "the chat template refuses the messages: they are too deeply nested"
            ) from error
        with self._lock:
            answer = self._ask(request.encode("ascii") + b"\n")
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise ChatRefusedError(f"the chat template refuses the messages: {answer['refused']}")
        raise InputError(f"the chat template is broken: {answer['broken']}")

    def _ask(self, request: bytes) -> dict[str, str]:
        """Sends a line and reads one; ends the process if that takes too long."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = _start()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(SECONDS, end)
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
            timer.join()  # or it could end the process during the next request
        if not line.endswith(b"\n") or late.is_set():
            self._process = None
            _end(process)
        if line.endswith(b"\n"):
            return json.loads(line)
        limit = f"for more than {SECONDS:g} seconds" if late.is_set() else "until its process ends"
        raise InputError(f"the chat template is broken: it computes {limit}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # of what it has not read
            pipe.close()


def _start() -> subprocess.Popen[bytes]:
    limits = [str(MEMORY_BYTES), str(MOST_CHARACTERS)]
    process = subprocess.Popen(
        [sys.executable, "-P", str(_SANDBOX), *limits],  # -P: files beside it are no modules
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(process.kill)
    return process


@functools.cache
def template_process() -> TemplateProcess:
    """The one that all templates share."""
    return TemplateProcess()
