"""A server in a process of its own, for benchmarks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from plt_jax.errors import FailedError


class ServerProcess(NamedTuple):
    """A server that answers."""

    process: subprocess.Popen
    url: str
    """The address of its API, which ends in /v1."""


@contextlib.contextmanager
def server_process(run: str | Path, *words: object) -> Iterator[ServerProcess]:
    """Starts `plt_jax.serve` on a run, on a free port, and ends it behind the block.

    Args:
      words: further options.

    Raises:
      FailedError: it does not start, or ends with another status than 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A file, since a pipe that nobody reads would stop the server.
        said = Path(folder) / "stderr.txt"
        command = [sys.executable, "-m", "plt_jax.serve", str(run), "--port", "0"]
        with said.open("w", encoding="utf-8") as file:
            process = subprocess.Popen([*command, *map(str, words)], stderr=file)
        try:
            while "is served at" not in (text := said.read_text(encoding="utf-8")):
                if process.poll() is not None:
                    raise FailedError(f"the server did not start: {text}")
                time.sleep(0.1)
            yield ServerProcess(process, text.split()[-1])
        finally:
            process.terminate()
            status = process.wait(60)
            print(said.read_text(encoding="utf-8")[-3000:], file=sys.stderr)
    if status:
        raise FailedError(f"the server ended with status {status}")
