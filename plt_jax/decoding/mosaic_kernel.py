"""One layer's attention in a decode step as a single kernel for Hopper GPUs, in Pallas' Mosaic GPU.

The kernel takes what the joined projection of queries, keys and values makes. It norms and rotates
queries and keys, writes the new keys and values into their slots, and attends to all slots once for
all loops. A program has one sequence, one key/value head and one part of the slots; what it leaves
are a sum of values, and the softmax's maximum and total, of each row. `fused_attention.py` merges
the parts.

A program's rows are those of one key/value head: of each loop in turn its G queries, its key and
its value, R·(G+2) in all. They fill a tile of 64 rows, the fewest that a product of Hopper has. The
rows of keys and values go through the products like queries, and their results are dropped. The
tile of rows is also the tile of new keys, and shifted by one row that of new values. So the new
keys are attended to from where they are made, and not from the cache, where their slots are masked:
another program may be writing them.

It needs jax 0.12: Pallas' names for GPUs were others before. Types are checked with jax 0.10,
hence what is ignored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plt_jax.model.blockwise import MASKED

HEAD_WIDTHS = (64, 128)
"""Head widths whose tiles fit shared memory."""
ROWS = 64
"""Rows of a tile, and so the most that a key/value head may have: L·(G+2)."""
ALIGNED = 8
"""Blocks of slots begin and end at a multiple of it, since tiles of keys have so many rows."""
BLOCK = 64
"""Slots that are multiplied at once."""
STAGES = 2
"""Blocks of slots that are loaded before they are needed, or being multiplied."""
PROGRAMS = 128
"""Up to about this number of programs at once, slots are divided into parts: one for each of an
H100's multiprocessors, whose shared memory holds two with heads of 64 and one with heads of 128. An
estimate, not measured."""
MOST_PARTS = 64
"""Most parts of the shared slots. The operations that merge them grow with their number."""

_LOG2_E = math.log2(math.e)
_TILE = plgpu.Layout.WGMMA
"""How the 128 threads of a program hold the numbers of a tile."""

Merged = tuple[jax.Array, jax.Array, jax.Array]
"""Of each row so far: its sum of values [64, H], its largest logit and its softmax's total [64]."""


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


def decode_attention(
    shape: Shape,
    qkv_BRKxH: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    norms_xH: jax.Array | None,
    gate_NH: jax.Array | None,
    lengths_B: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    epsilon: float,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Attention of one row for each loop at position `lengths`, and the cache with its keys.

    Args:
      qkv_BRKxH: bfloat16 [B, R, K, G+2, H], projected and not rotated.
      cos_Bh, sin_Bh: RoPE's rotation, float32 [B, H/2].
      norms_xH: norms of the queries, and behind them of the key, [G+1, H]; None for none. The norms
        of all queries are equal.
      gate_NH: weights of gates that are made of the queries, float32 [N, H]; None for others.
      keys, values: bfloat16 [B, K, slots, H]. They are updated in place where a program may.

    Returns:
      The parts: sums of values [B, K, parts, rows, H], rows being a multiple of 8; for each row the
      base-2 logarithm that its sums are scaled by, its softmax's total, and its gate's sum before
      bias and sigmoid, [B, K, parts, 3, 64]; and new keys and values.
    """
    inputs = {
        "qkv": qkv_BRKxH,
        "cos": cos_Bh,
        "sin": sin_Bh,
        "norms": norms_xH,
        "gate": gate_NH,
        "lengths": lengths_B,
    }
    # Halves of H are an axis of their own, since RoPE multiplies them separately.
    for name in ("norms", "gate"):
        if (array := inputs[name]) is not None:
            inputs[name] = array.reshape(len(array), 2, -1)
    given = {name: array for name, array in inputs.items() if array is not None}
    # References are updated in place, which operands are not.
    cache = jax.new_ref(keys), jax.new_ref(values)
    B, K, H, parts = shape.batch, shape.kv_heads, shape.head_width, shape.parts
    scratch = _scratch(shape, qkv_BRKxH.dtype, given)

    def body(*refs, **buffers):
        named = dict(zip((*given, "keys", "values", "sums", "statistics"), refs, strict=True))
        _Program(shape, epsilon, named, buffers).run()

    sums, statistics = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, K, parts, -(-shape.rows // 8) * 8, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, parts, 3, ROWS), jnp.float32),
        ),
        grid=(B, K, parts),
        grid_names=("batch", "head", "part"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="decode_attention",
    )(*given.values(), *cache)
    keys, values = (jax.freeze(ref) for ref in cache)
    return (sums, statistics), keys, values


def _scratch(shape: Shape, dtype: jnp.dtype, given: dict[str, jax.Array]) -> dict[str, Any]:
    """The buffers of a program in shared memory, and its barriers."""
    H, half = shape.head_width, shape.head_width // 2

    def tiles(*sizes: int):
        # The layout that products read: tiles of 8 rows and 128 bytes.
        tiling = plgpu.TilingTransform((8, 128 // dtype.itemsize))
        return plgpu.SMEM(sizes, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))

    # Rows as they are, one behind the other. Left to itself, Pallas would swizzle them: a load from
    # the second row on would then find the numbers of a row in another order.
    plain = plgpu.SMEM((ROWS + 8, H), dtype, transforms=(plgpu.TilingTransform((1, half)),))

    def vectors(*sizes: int):
        return plgpu.SMEM(sizes, jnp.float32)

    buffers = {
        # One row more than a tile: the tile is read a second time from the second row on.
        "rows": plain,
        "row_tile": tiles(ROWS, H),
        "new_values": tiles(ROWS, H),
        "powers": tiles(ROWS, BLOCK),
        "keys_tile": tiles(STAGES, BLOCK, H),
        "values_tile": tiles(STAGES, BLOCK, H),
        "cos_row": vectors(half),
        "sin_row": vectors(half),
        "sums_tile": vectors(ROWS, H),
        "statistics_rows": vectors(3, ROWS),
    }
    if "norms" in given:
        buffers |= {"q_norm": vectors(2, half), "k_norm": vectors(2, half)}
    if "gate" in given:
        buffers["gate_rows"] = vectors(shape.group, 2, half)
    loads = shape.loops + 2 + 2 * ("norms" in given) + ("gate" in given)
    return buffers | {
        "rows_arrived": plgpu.Barrier(num_arrivals=loads),
        "keys_arrived": plgpu.Barrier(num_barriers=STAGES),
        "values_arrived": plgpu.Barrier(num_barriers=STAGES),
    }


class _Program:
    """One program: a sequence, a key/value head and a part of the slots.

    Numbers that depend on the program are traced scalars; `refs` are arrays in the GPU's memory,
    and `buffers` those in shared memory.
    """

    def __init__(self, shape: Shape, epsilon: float, refs: dict[str, Any], buffers: dict[str, Any]):
        self.shape, self.epsilon, self.refs, self.buffers = shape, epsilon, refs, buffers
        self.batch, self.head, self.part = (
            jax.lax.axis_index(name) for name in ("batch", "head", "part")
        )
        self.gated = shape.window > 0
        self.position = jnp.minimum(refs["lengths"][self.batch], shape.capacity - 1)
        self.of_windows = self.part >= shape.shared_parts
        """Whether this program's slots are the windows. Without windows it is always false."""

    def run(self) -> None:
        self._load_rows()
        blocks = self._blocks()
        for index in range(STAGES):
            self._load_block_if(index < blocks, jnp.int32(index))
        plgpu.barrier_wait(self.buffers["rows_arrived"])
        self._turn_rows()
        self._write_new()
        carry = self._attend_new(self._nothing())

        def attend_block(index: jax.Array, carry: Merged) -> Merged:
            carry = self._attend_block(index, carry)
            self._load_block_if(index + STAGES < blocks, index + STAGES)
            return carry

        self._leave(jax.lax.fori_loop(0, blocks, attend_block, carry))

    # ---- what a program reads and writes ----

    def _load_rows(self) -> None:
        shape, refs, buffers = self.shape, self.refs, self.buffers
        count = shape.rows_of_loop
        loads = [
            (
                refs["qkv"].at[self.batch, loop, self.head],
                buffers["rows"].at[pl.ds(loop * count, count)],
            )
            for loop in range(shape.loops)
        ]
        loads += [(refs[name].at[self.batch], buffers[f"{name}_row"]) for name in ("cos", "sin")]
        if "norms" in refs:
            loads.append((refs["norms"].at[0], buffers["q_norm"]))
            loads.append((refs["norms"].at[shape.group], buffers["k_norm"]))
        if "gate" in refs:
            queries = pl.ds(self.head * shape.group, shape.group)
            loads.append((refs["gate"].at[queries], buffers["gate_rows"]))
        for source, target in loads:
            plgpu.copy_gmem_to_smem(source, target, buffers["rows_arrived"])

    def _blocks(self) -> jax.Array:
        """How many blocks of old keys this program attends to. Merged take blocks in turn."""
        shape = self.shape
        written = jax.lax.div(self.position + (BLOCK - 1), jnp.int32(BLOCK))
        after = written - self.part + (shape.shared_parts - 1)
        shared = jax.lax.div(jnp.maximum(after, 0), jnp.int32(shape.shared_parts))
        end = shape.capacity + (shape.loops - 1) * shape.window
        windows = -((shape.windows_start - end) // BLOCK)
        return jnp.where(self.of_windows, windows, shared) if self.gated else shared

    def _first_slot(self, block: jax.Array) -> jax.Array:
        shared = (self.part + block * self.shape.shared_parts) * BLOCK
        if not self.gated:
            return shared
        return jnp.where(self.of_windows, self.shape.windows_start + block * BLOCK, shared)

    def _load_block_if(self, wanted: jax.Array, block: jax.Array) -> None:
        @pl.when(wanted)
        def _():
            stage = jax.lax.rem(block, jnp.int32(STAGES))
            slots = (self.batch, self.head, pl.ds(self._first_slot(block), BLOCK))
            for name in ("keys", "values"):
                plgpu.copy_gmem_to_smem(
                    self.refs[name].at[slots],
                    self.buffers[f"{name}_tile"].at[stage],
                    self.buffers[f"{name}_arrived"].at[stage],
                )

    def _write_new(self) -> None:
        """Writes loop 1's new key and value, or those of the later loops, into their slots."""
        shape = self.shape

        def write(loop: int, slot: jax.Array) -> None:
            for name, row in (("keys", shape.group), ("values", shape.group + 1)):
                plgpu.copy_smem_to_gmem(
                    self.buffers["rows"].at[pl.ds(loop * shape.rows_of_loop + row, 1)],
                    self.refs[name].at[self.batch, self.head, pl.ds(slot, 1)],
                )

        @pl.when(self.part == 0)
        def _():
            write(0, self.position)

        if self.gated:

            @pl.when(self.of_windows)
            def _():
                for loop in range(1, shape.loops):
                    write(loop, shape.capacity + (loop - 1) * shape.window + self._turn())

    def _turn(self) -> jax.Array:
        """The new position's slot within each window."""
        return jax.lax.rem(self.position, jnp.int32(self.shape.window))

    def _leave(self, carry: Merged) -> None:
        """Writes what the program found."""
        refs, buffers = self.refs, self.buffers
        buffers["sums_tile"][...], *statistics = carry
        for index, row in enumerate(statistics):
            buffers["statistics_rows"][index] = row
        plgpu.commit_smem()
        here = (self.batch, self.head, self.part)
        rows = buffers["sums_tile"].at[pl.ds(0, refs["sums"].shape[3])]
        plgpu.copy_smem_to_gmem(rows, refs["sums"].at[here])
        plgpu.copy_smem_to_gmem(buffers["statistics_rows"], refs["statistics"].at[here])
        plgpu.wait_smem_to_gmem(0)

    # ---- arithmetic ----

    def _turn_rows(self) -> None:
        """Norms and rotates the rows of queries and keys, and lays out the tiles of new rows."""
        shape, buffers = self.shape, self.buffers
        half = shape.head_width // 2
        row = _index((ROWS, half), 0)
        number = _rem(row, shape.rows_of_loop)
        is_key, is_value = number == shape.group, number == shape.group + 1
        halves = [pl.ds(index * half, half) for index in range(2)]
        given = [
            _load(buffers["rows"].at[pl.ds(0, ROWS), columns], _TILE).astype(jnp.float32)
            for columns in halves
        ]
        normed = given
        if "norms" in self.refs:
            squares = sum((x * x).sum(axis=1) for x in given)
            inverse = jax.lax.rsqrt(squares / shape.head_width + self.epsilon)
            inverse = jax.lax.broadcast_in_dim(inverse, row.shape, [0])
            normed = []
            for index, x in enumerate(given):
                q_norm, k_norm = (
                    _row_vector(buffers[name].at[index]) for name in ("q_norm", "k_norm")
                )
                scaled = x * inverse * jnp.where(is_key, k_norm, q_norm)
                normed.append(scaled.astype(jnp.bfloat16).astype(jnp.float32))
        cos, sin = _row_vector(buffers["cos_row"]), _row_vector(buffers["sin_row"])
        turned = (normed[0] * cos - normed[1] * sin, normed[1] * cos + normed[0] * sin)
        # A thread reads and writes the same numbers of the buffer, so it can be overwritten.
        rounded = [
            jnp.where(is_value, x, rotated).astype(jnp.bfloat16)
            for x, rotated in zip(given, turned, strict=True)
        ]
        for columns, x in zip(halves, rounded, strict=True):
            _store(buffers["rows"].at[pl.ds(0, ROWS), columns], x)
        if "gate" in self.refs:
            buffers["statistics_rows"][2] = self._gate_sums(number, rounded)
        plgpu.commit_smem()
        buffers["row_tile"][...] = _load(buffers["rows"].at[pl.ds(0, ROWS)], _TILE)
        below = _load(buffers["rows"].at[pl.ds(1, ROWS)], _TILE)
        row = _index(below.shape, 0)
        is_key = (_rem(row, shape.rows_of_loop) == shape.group) & (row < shape.rows)
        # Rows beyond the last are whatever shared memory held, which may be no number.
        buffers["new_values"][...] = jnp.where(is_key, below, jnp.zeros_like(below))
        plgpu.commit_smem()

    def _gate_sums(self, number: jax.Array, rows: list[jax.Array]) -> jax.Array:
        """The products of the queries with the weights of their gates, [64]."""
        total = None
        for index, x in enumerate(rows):
            weights = jnp.zeros(x.shape, jnp.float32)
            weights = plgpu.layout_cast(weights, _TILE)
            for query in range(self.shape.group):
                of_query = _row_vector(self.buffers["gate_rows"].at[query, index])
                weights = jnp.where(number == query, of_query, weights)
            part = (x.astype(jnp.float32) * weights).sum(axis=1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _nothing(self) -> Merged:
        """Sums, maxima and totals before the first block."""

        def full(sizes: tuple[int, ...], start: float, layout) -> jax.Array:
            return plgpu.layout_cast(jnp.full(sizes, start, jnp.float32), layout)

        rows = _TILE.reduce(1)
        sums = full((ROWS, self.shape.head_width), 0.0, _TILE)
        return sums, full((ROWS,), MASKED, rows), full((ROWS,), 0.0, rows)

    def _attend_new(self, carry: Merged) -> Merged:
        """Attends to the new keys: the first part to loop 1's, the windows' to each row's own.

        Other parts attend to none. Their sums have a maximum of MASKED, so that they count for
        nothing as soon as another key is merged.
        """
        shape = self.shape
        column = _index((ROWS, BLOCK), 1)
        is_key = (_rem(column, shape.rows_of_loop) == shape.group) & (column < shape.rows)
        source = _div(column, shape.rows_of_loop)
        seen = is_key & (source == jnp.where(self.part == 0, 0, -1))
        if self.gated:
            own = jnp.where(self.of_windows, 1, shape.loops)
            seen |= is_key & (source == self._loop_of_row()) & (source >= own)
        buffers = self.buffers
        return self._merge(carry, buffers["row_tile"], buffers["new_values"], seen)

    def _attend_block(self, block: jax.Array, carry: Merged) -> Merged:
        """Attends to a block of old keys."""
        shape, buffers = self.shape, self.buffers
        stage = jax.lax.rem(block, jnp.int32(STAGES))
        plgpu.barrier_wait(buffers["keys_arrived"].at[stage])
        slot = _index((ROWS, BLOCK), 1) + self._first_slot(block)
        shared_end = jnp.where(self.of_windows, 0, self.position) if self.gated else self.position
        seen = slot < shared_end
        if self.gated:
            held = jnp.where(self.of_windows, jnp.minimum(self.position, shape.window), 0)
            loop = self._loop_of_row()
            place = slot - (shape.capacity + (loop - 1) * shape.window)
            seen |= (loop > 0) & (place >= 0) & (place < held) & (place != self._turn())
        keys, values = buffers["keys_tile"].at[stage], buffers["values_tile"].at[stage]
        return self._merge(carry, keys, values, seen, buffers["values_arrived"].at[stage])

    def _loop_of_row(self) -> jax.Array:
        return _div(_index((ROWS, BLOCK), 0), self.shape.rows_of_loop)

    def _merge(self, carry: Merged, keys, values, seen: jax.Array, values_arrived=None) -> Merged:
        """Attends to a tile of keys and values, and merges that with what came before."""
        sums, largest, total = carry
        logits = _product(self.buffers["row_tile"], keys.transpose((1, 0)))
        logits *= _LOG2_E / math.sqrt(self.shape.head_width)
        logits = jnp.where(seen, logits, jnp.full_like(logits, MASKED))
        new = jnp.maximum(largest, logits.max(axis=1))
        decay = jnp.exp2(largest - new)
        powers = jnp.exp2(logits - jax.lax.broadcast_in_dim(new, logits.shape, [0]))
        total = total * decay + powers.sum(axis=1)
        self.buffers["powers"][...] = powers.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if values_arrived is not None:
            plgpu.barrier_wait(values_arrived)
        sums *= jax.lax.broadcast_in_dim(decay, sums.shape, [0])
        return sums + _product(self.buffers["powers"], values), new, total


def _product(a, b) -> jax.Array:
    """The product of two tiles in shared memory, summed in float32."""

    def run(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(run, accumulator((a.shape[0], b.shape[1]), jnp.float32))


def _index(shape: tuple[int, ...], axis: int) -> jax.Array:
    """The numbers of a tile's rows or columns."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_TILE)


def _rem(x: jax.Array, divisor: int) -> jax.Array:
    return jax.lax.rem(x, jnp.full_like(x, divisor))


def _div(x: jax.Array, divisor: int) -> jax.Array:
    return jax.lax.div(x, jnp.full_like(x, divisor))


def _load(ref, layout) -> jax.Array:
    """What a buffer without tiles holds."""
    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]


def _store(ref, x: jax.Array) -> None:
    """Stores to a buffer without tiles."""
    plgpu.store(ref, x, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]


def _row_vector(ref) -> jax.Array:
    """A vector as a tile whose rows are all equal."""
    vector = _load(ref, _TILE.reduce(0))
    return jax.lax.broadcast_in_dim(vector, (ROWS, *vector.shape), [1])
