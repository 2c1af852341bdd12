"""Files of results, which process 0 writes for all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plt_jax.distributed import processes
from plt_jax.files.writing import write_pieces


def write_results(path: Path, pieces: Iterable[str]) -> None:
    """Replaces a file by the joined pieces of a text; process 0 writes it.

    All processes must call it, and all take every piece: computing it may need all of them.

    Raises:
      InputError: the file cannot be written.
    """
    if processes.is_first():
        write_pieces(path, pieces)
        return
    for _ in pieces:
        pass
