"""File systems for tests of what fails."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import disks


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of one megabyte, mounted at a new folder; skips where none can be mounted."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disks.small_disk(folder, "1m"))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine mounts no file system for tests: {error}")
        yield folder


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Makes such a file system refuse writing for a while."""
    disks.remount(disk, "ro")
    try:
        yield
    finally:
        disks.remount(disk, "rw")
