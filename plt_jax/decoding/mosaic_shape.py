"""The inputs and sizes of the decode step's kernel, and how its work is divided. Without Pallas,
which takes time to import and has other names before jax 0.12."""

from __future__ import annotations

from typing import NamedTuple

import jax

HEAD_WIDTHS = (64, 128)
"""Head widths whose tiles fit shared memory."""
ROWS = 64
"""Rows of a tile, and so the most that a key/value head may have: L·(G+2)."""
ALIGNED = 8
"""Blocks of slots begin and end at a multiple of it, since tiles of keys have so many rows."""
BLOCK = 64
"""Slots that are multiplied at once."""
PROGRAMS = 128
"""Up to about this number of programs at once, slots are divided into parts: one for each of an
H100's multiprocessors, whose shared memory holds two with heads of 64 and one with heads of 128. An
estimate, not measured."""
MOST_PARTS = 64
"""Most parts of the shared slots. The operations that merge them grow with their number."""


class Inputs(NamedTuple):
    """What the kernel reads, of all sequences and heads or of those that one device holds."""

    qkv_BRKxH: jax.Array
    """bfloat16 [B, R, K, G+2, H], projected and not rotated; see `ops.joined_qkv`."""
    cos_Bh: jax.Array
    sin_Bh: jax.Array
    """RoPE's rotation, float32 [B, H/2]."""
    norms_xH: jax.Array | None
    """Norms of the queries, and behind them of the key, [G+1, H]; None for none. The norms of all
    queries are equal."""
    gate_NH: jax.Array | None
    """Weights of gates that are made of the queries, float32 [N, H]; None for others."""
    lengths_B: jax.Array
    keys: jax.Array
    values: jax.Array
    """bfloat16 [B, K, slots, H]. They are updated in place where a program may."""


class Shape(NamedTuple):
    """The sizes that a kernel is made for."""

    batch: int
    loops: int
    """R; row 0 is loop 1's."""
    kv_heads: int
    group: int
    """G, the number of query heads of each key/value head."""
    head_width: int
    capacity: int
    """S, the number of shared slots."""
    window: int
    """W, the number of slots of each later loop, which lie behind the shared ones; 0 for none."""

    @property
    def rows_of_loop(self) -> int:
        """Queries, key and value: G+2."""
        return self.group + 2

    @property
    def rows(self) -> int:
        """The number of rows of a program, R·(G+2)."""
        return self.loops * self.rows_of_loop

    @property
    def shared_parts(self) -> int:
        """The number of parts of the shared slots: of at least two blocks each, so that one is
        loaded while the other is multiplied."""
        at_once = PROGRAMS * (128 // self.head_width)
        most = min(at_once // (self.batch * self.kv_heads), MOST_PARTS)
        return max(1, min(self.capacity // (2 * BLOCK), most))

    @property
    def windows_start(self) -> int:
        """The slot at which the blocks of the windows begin: at the windows, or shortly before."""
        return self.capacity // ALIGNED * ALIGNED

    @property
    def parts(self) -> int:
        """The number of parts: those of the shared slots, and the windows."""
        return self.shared_parts + (1 if self.window else 0)
