"""Where a run's logs are written: into its directory, or beside a bucket and sent up."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from plt_jax.buckets.address import is_in_bucket
from plt_jax.distributed import processes
from plt_jax.errors import FailedError, InputError
from plt_jax.files.folders import copy_file, remove_folder
from plt_jax.files.paths import files_in
from plt_jax.locks import Lock
from plt_jax.runs.names import METRICS
from plt_jax.training.trackers import WANDB_RUN

PAUSE_SECONDS = 2
"""Seconds between two times that logs are sent: an object may be written once a second."""


class Logs:
    """The folder that metrics, events and profiles of one start of a run are written to.

    On a disk it is the run directory. Nothing in a bucket can be appended to, so a run there has a
    temporary folder; `send` sends its files up in the background. A file that cannot be sent is
    sent with the next ones: it is no reason to end the run.

    It is a context manager, which sends what is left. Only process 0 writes logs.
    """

    def __init__(self, directory: Path, lock: Lock):
        """Fetches what a run in a bucket goes on with.

        Args:
          directory: the run directory.
          lock: its lock, which this process has.
        """
        self._directory, self._lock = directory, lock
        self.path = directory
        """The folder to write to."""
        if not is_in_bucket(directory) or not processes.is_first():
            return
        self.path = Path(tempfile.mkdtemp(prefix="plt_jax-")) / directory.name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="logs")
        self._next: Future[None] | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._failed, self._ended = False, threading.Event()
        for name in (METRICS, WANDB_RUN):
            if (directory / name).exists():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(directory / name, self.path / name)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_) -> None:
        if self.path == self._directory:
            return
        self._ended.set()
        self._thread.submit(self._send)
        self._thread.shutdown()
        if self._failed:
            print(f"note: what was not sent is in {self.path}", file=sys.stderr, flush=True)
        else:
            remove_folder(self.path.parent)

    def send(self) -> None:
        """Begins to send what has been written since the last time, after what is being sent.

        Raises:
          FailedError: another process has taken over the run directory.
        """
        if self.path == self._directory:
            return
        self._lock.check()
        if self._next is None or self._next.running() or self._next.done():
            self._next = self._thread.submit(self._send)

    def _send(self) -> None:
        with contextlib.suppress(FailedError):  # who has taken over the run writes its logs now
            self._lock.renew()
            self._send_changed()
        self._ended.wait(PAUSE_SECONDS)

    def _send_changed(self) -> None:
        try:
            for name in files_in(self.path):
                file = self.path / name
                status = file.stat()
                version = (status.st_size, status.st_mtime_ns)
                if self._sent.get(name) != version:
                    copy_file(file, self._directory / name)
                    self._sent[name] = version
            self._failed = False
        except (OSError, InputError) as error:
            if not self._failed:
                reason = error.strerror if isinstance(error, OSError) else error
                print(
                    f"note: the logs are not sent to {self._directory} for now: {reason}",
                    file=sys.stderr,
                    flush=True,
                )
            self._failed = True
