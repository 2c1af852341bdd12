"""What a decode step is compiled for. Nothing here imports JAX, so that parsing is quick."""

from __future__ import annotations

from typing import NamedTuple


class DecodeShape(NamedTuple):
    """A decode step's sizes."""

    batch: int
    """The number of sequences."""
    context: int
    """The positions of the cache."""
    weights: str | None = None
    """The dtype of the large weights; see `prepare_for_decode`."""
