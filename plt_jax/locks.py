"""Locks: the right to write into a folder, which one process at a time has."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing.reduction
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from plt_jax.buckets.address import is_in_bucket
from plt_jax.errors import FailedError, one_line

LOCK = "lock.json"
"""The object that tells of a lock, in a folder in a bucket."""
_NO_LOCKS = frozenset(
    (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF)
)
"""What file systems answer that have no locks, or, the last of them, none for folders."""
LOCK_FILE = ".lock"
"""The file that is locked in the place of a folder, where folders cannot be, as on NFS."""
BEAT_SECONDS = 10
"""How often the holder of a lock in a bucket writes it anew."""
GONE_SECONDS = 60
"""How long a lock in a bucket must stay unwritten for its holder to be gone."""


class Lock(Protocol):
    """The right to write into a folder."""

    @property
    def is_held(self) -> bool:
        """Whether this process has taken the lock, or shares it."""
        ...

    def take(self) -> bool:
        """Takes the lock; returns whether nobody else has it.

        Raises:
          OSError: the folder, or the bucket, cannot be opened.
        """
        ...

    def check(self) -> None:
        """Raises FailedError if another process is known to have taken the lock over."""
        ...

    def renew(self) -> None:
        """Raises FailedError if another process has taken the lock over; asks the bucket for it."""
        ...

    def release(self) -> None:
        """Gives the lock back, if it was taken."""
        ...

    def holder(self) -> str:
        """Who has the lock that could not be taken, for people."""
        ...


def lock_file(file: int, wait: bool) -> bool | None:
    """Takes the lock of an open file or folder, which ends when that is closed.

    Args:
      file: its descriptor. Network file systems lock what is open for writing alone.
      wait: whether to wait for the process that has it.

    Returns:
      Whether this process has it now; None on a file system without locks.

    Raises:
      OSError: the lock cannot be had for another reason, such as a disk that does not answer.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def lock_of(directory: Path, take_over: bool | None = None) -> Lock:
    """The lock of a folder.

    Args:
      take_over: whether to take it from a holder in a bucket that does not give it back, and may
        still write it; None where a user has no option to say so. On a disk a lock ends with its
        holder, so that there is nothing to take.
    """
    return BucketLock(directory, take_over) if is_in_bucket(directory) else FolderLock(directory)


class FolderLock:
    """The right to write into a folder, which one process at a time has.

    It ends with the process, however that ends. A process that is spawned with the lock among its
    arguments shares it: then it ends with the last of them. The lock is the folder's own, so that
    no file tells of it; on network file systems, which lock files alone, it is that of LOCK_FILE,
    which stays. On file systems without locks, everyone has the right.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._descriptor: int | None = None

    def __getstate__(self) -> tuple[Path, Any]:
        descriptor = self._descriptor
        shared = None if descriptor is None else multiprocessing.reduction.DupFd(descriptor)
        return self._folder, shared

    def __setstate__(self, state: tuple[Path, Any]) -> None:
        self._folder, shared = state
        self._descriptor = None if shared is None else shared.detach()

    @property
    def is_held(self) -> bool:
        """Whether this process has taken the lock, or shares it."""
        return self._descriptor is not None

    def take(self) -> bool:
        """Takes the lock of a folder that exists; returns whether nobody else has it.

        Raises:
          OSError: the folder cannot be opened.
        """
        if self.is_held or not self._folder.is_dir():
            return True
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        taken = lock_file(descriptor, wait=False)
        if taken is None:
            os.close(descriptor)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(self._folder / LOCK_FILE, flags, mode=0o666)
            taken = lock_file(descriptor, wait=False)
        if taken is False:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Gives the lock back, if it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def check(self) -> None:
        """Does nothing: nobody can take the lock from a process that has it."""

    def renew(self) -> None:
        """Does nothing, see `check`."""

    def holder(self) -> str:
        """Who has the lock that could not be taken, for people."""
        return "another process"


class BucketLock:
    """The right to write into a folder in a bucket, which one process at a time has.

    An object tells of it, which its holder writes anew every BEAT_SECONDS. Each write names the
    generation that it replaces, so that of two processes only one can succeed. Who finds a lock
    waits for its holder to write it; after GONE_SECONDS without a write the holder is gone. No
    clock of another machine is read.
    """

    def __init__(self, folder: Path, take_over: bool | None = None):
        self._path, self._take_over = folder / LOCK, take_over
        self._token = uuid.uuid4().hex
        self._generation, self._lost = 0, False
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")

    @property
    def is_held(self) -> bool:
        """Whether this process has taken the lock."""
        return self._generation != 0

    def take(self) -> bool:
        """Takes the lock; returns whether nobody else has it.

        Raises:
          OSError: the bucket does not answer, or nothing may be written to it.
        """
        from plt_jax.buckets.service import generation_of

        if self.is_held:
            return True
        for _ in range(5 if self._take_over else 1):  # its holder may write it at the same time
            before = generation_of(self._path)
            if before and not self._take_over and not self._is_abandoned(before):
                return False
            if self._write(before):
                self._thread.start()
                return True
        return False

    def check(self) -> None:
        """Raises FailedError if another process is known to have taken the lock over."""
        if self._lost:
            raise FailedError(
                f"{self.holder()} has taken over {self._path.parent}, since this one seemed to be "
                "gone; look at its output"
            )

    def renew(self) -> None:
        """Raises FailedError if another process has taken the lock over; asks the bucket for it."""
        if self.is_held:
            try:
                self._write(self._generation)
            except OSError as error:
                raise FailedError(f"cannot write {self._path}: {error.strerror}") from error
        self.check()

    def release(self) -> None:
        """Gives the lock back, if it was taken and is still this process's."""
        from plt_jax.buckets.service import delete_generation

        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.is_held and not self._lost:
            with contextlib.suppress(OSError):  # it will seem to be gone
                delete_generation(self._path, self._generation)
        self._generation = 0

    def holder(self) -> str:
        """The process that the lock's object names, for people."""
        held = self._read()
        if "host" not in held:
            return "another process"
        return one_line(f"process {held.get('process')} on {held['host']}")

    def _is_abandoned(self, before: int) -> bool:
        """Whether the holder of a lock of this generation is gone."""
        from plt_jax.buckets.service import generation_of

        held = self._read()
        if held.get("machine") == _machine() and not _is_running(held.get("process")):
            return True
        hint = " (--take_over does not wait)" if self._take_over is False else ""
        print(
            f"{self._path} is there; waiting up to {GONE_SECONDS} s for a sign of its holder, "
            f"{self.holder()}{hint}",
            flush=True,
        )
        deadline = time.monotonic() + GONE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1)
            if generation_of(self._path) != before:
                return False
        return True

    def _read(self) -> dict[str, Any]:
        """What the lock's object says; nothing if it is gone or says something else."""
        try:
            held = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return held if isinstance(held, dict) else {}

    def _write(self, before: int) -> bool:
        """Writes the lock's object in the place of a generation of it; returns whether it was
        there."""
        from plt_jax.buckets.service import generation_of, write_generation

        held = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": _machine(),
            "token": self._token,
            "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        with self._writing:
            if self._ended.is_set():
                return False
            before = self._generation or before
            generation = write_generation(self._path, json.dumps(held) + "\n", before)
            if generation is None and self._read().get("token") == self._token:
                # A write whose answer was lost has been repeated.
                generation = generation_of(self._path)
            self._lost = generation is None and self.is_held
            self._generation = generation or self._generation
            return generation is not None

    def _beat(self) -> None:
        while not self._lost and not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the next one may succeed
                self._write(self._generation)


def _machine() -> str:
    """What the numbers of processes belong to: this start of this machine, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex  # unlike all others


def _is_running(process: Any) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, OverflowError):
        return True
    return True
