"""Small file systems that a test can fill and make read-only."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mounts a file system in memory at a folder, and unmounts it at the end; needs root.

    Args:
      size: its size as tmpfs takes it, such as `64m`.

    Raises:
      OSError, subprocess.CalledProcessError: this machine does not allow mounting.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Changes a mounted file system: its size (`size=1m`), read-only (`ro`), writable (`rw`)."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(path: Path) -> None:
    """Writes one file that takes all the free space of its file system."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
