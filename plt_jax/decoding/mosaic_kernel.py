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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plt_jax.decoding.mosaic_shape import BLOCK, ROWS, Inputs, Shape
from plt_jax.decoding.mosaic_tiles import (
    TILE,
    indices,
    load_plain,
    product,
    quotient,
    remainder,
    row_vector,
    store_plain,
)
from plt_jax.model.blockwise import MASKED

STAGES = 2
"""Blocks of slots that are loaded before they are needed, or being multiplied."""

_LOG2_E = math.log2(math.e)

Merged = tuple[jax.Array, jax.Array, jax.Array]
"""Of each row so far: its sum of values [64, H], its largest logit times the base-2 logarithm of e,
and its softmax's total [64]."""


def decode_attention(
    shape: Shape, inputs: Inputs, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Attention of one row for each loop at position `lengths`, and the cache with its keys.

    Args:
      epsilon: of the norms.

    Returns:
      The parts: sums of values [B, K, parts, rows, H], rows being a multiple of 8; for each row its
      largest logit, its softmax's total, and its gate's sum before bias and sigmoid,
      [B, K, parts, 3, 64]; and new keys and values.
    """
    H, dtype = shape.head_width, inputs.qkv_BRKxH.dtype
    arrays = {
        "qkv": inputs.qkv_BRKxH,
        "cos": inputs.cos_Bh,
        "sin": inputs.sin_Bh,
        "lengths": inputs.lengths_B,
    }
    # Halves of H are an axis of their own, since RoPE multiplies them separately.
    for name, array in (("norms", inputs.norms_xH), ("gate", inputs.gate_NH)):
        if array is not None:
            arrays[name] = array.reshape(-1, 2, H // 2)
    # References are updated in place, which operands are not.
    cache = jax.new_ref(inputs.keys), jax.new_ref(inputs.values)
    B, K, parts = shape.batch, shape.kv_heads, shape.parts

    def body(*refs, **buffers):
        named = dict(zip((*arrays, "keys", "values", "sums", "statistics"), refs, strict=True))
        _Program(shape, epsilon, named, buffers).run()

    sums, statistics = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, K, parts, -(-shape.rows // 8) * 8, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, parts, 3, ROWS), jnp.float32),
        ),
        grid=(B, K, parts),
        grid_names=("batch", "head", "part"),
        scratch_types=_scratch(shape, dtype, arrays),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="decode_attention",
    )(*arrays.values(), *cache)
    keys, values = (jax.freeze(ref) for ref in cache)
    return (sums, statistics), keys, values


def _scratch(shape: Shape, dtype: jnp.dtype, arrays: dict[str, jax.Array]) -> dict[str, Any]:
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
    if "norms" in arrays:
        buffers |= {"q_norm": vectors(2, half), "k_norm": vectors(2, half)}
    if "gate" in arrays:
        buffers["gate_rows"] = vectors(shape.group, 2, half)
    loads = shape.loops + 2 + 2 * ("norms" in arrays) + ("gate" in arrays)
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
        buffers["sums_tile"][...], largest, total = carry
        buffers["statistics_rows"][0] = largest / _LOG2_E
        buffers["statistics_rows"][1] = total
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
        row = indices((ROWS, half), 0)
        number = remainder(row, shape.rows_of_loop)
        is_key, is_value = number == shape.group, number == shape.group + 1
        halves = [pl.ds(index * half, half) for index in range(2)]
        given = [
            load_plain(buffers["rows"].at[pl.ds(0, ROWS), columns], TILE).astype(jnp.float32)
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
                    row_vector(buffers[name].at[index]) for name in ("q_norm", "k_norm")
                )
                scaled = x * inverse * jnp.where(is_key, k_norm, q_norm)
                normed.append(scaled.astype(jnp.bfloat16).astype(jnp.float32))
        cos, sin = row_vector(buffers["cos_row"]), row_vector(buffers["sin_row"])
        turned = (normed[0] * cos - normed[1] * sin, normed[1] * cos + normed[0] * sin)
        # A thread reads and writes the same numbers of the buffer, so it can be overwritten.
        rounded = [
            jnp.where(is_value, x, rotated).astype(jnp.bfloat16)
            for x, rotated in zip(given, turned, strict=True)
        ]
        for columns, x in zip(halves, rounded, strict=True):
            store_plain(buffers["rows"].at[pl.ds(0, ROWS), columns], x)
        if "gate" in self.refs:
            buffers["statistics_rows"][2] = self._gate_sums(number, rounded)
        plgpu.commit_smem()
        buffers["row_tile"][...] = load_plain(buffers["rows"].at[pl.ds(0, ROWS)], TILE)
        below = load_plain(buffers["rows"].at[pl.ds(1, ROWS)], TILE)
        row = indices(below.shape, 0)
        is_key = (remainder(row, shape.rows_of_loop) == shape.group) & (row < shape.rows)
        # Rows beyond the last are whatever shared memory held, which may be no number.
        buffers["new_values"][...] = jnp.where(is_key, below, jnp.zeros_like(below))
        plgpu.commit_smem()

    def _gate_sums(self, number: jax.Array, rows: list[jax.Array]) -> jax.Array:
        """The products of the queries with the weights of their gates, [64]."""
        total = None
        for index, x in enumerate(rows):
            weights = jnp.zeros(x.shape, jnp.float32)
            weights = plgpu.layout_cast(weights, TILE)
            for query in range(self.shape.group):
                of_query = row_vector(self.buffers["gate_rows"].at[query, index])
                weights = jnp.where(number == query, of_query, weights)
            part = (x.astype(jnp.float32) * weights).sum(axis=1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _nothing(self) -> Merged:
        """Sums, maxima and totals before the first block."""

        def full(sizes: tuple[int, ...], start: float, layout) -> jax.Array:
            return plgpu.layout_cast(jnp.full(sizes, start, jnp.float32), layout)

        rows = TILE.reduce(1)
        sums = full((ROWS, self.shape.head_width), 0.0, TILE)
        return sums, full((ROWS,), MASKED, rows), full((ROWS,), 0.0, rows)

    def _attend_new(self, carry: Merged) -> Merged:
        """Attends to the new keys: the first part to loop 1's, the windows' to each row's own.

        Other parts attend to none. Their sums have a maximum of MASKED, so that they count for
        nothing as soon as another key is merged.
        """
        shape = self.shape
        column = indices((ROWS, BLOCK), 1)
        is_key = (remainder(column, shape.rows_of_loop) == shape.group) & (column < shape.rows)
        source = quotient(column, shape.rows_of_loop)
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
        slot = indices((ROWS, BLOCK), 1) + self._first_slot(block)
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
        return quotient(indices((ROWS, BLOCK), 0), self.shape.rows_of_loop)

    def _merge(self, carry: Merged, keys, values, seen: jax.Array, values_arrived=None) -> Merged:
        """Attends to a tile of keys and values, and merges that with what came before."""
        sums, largest, total = carry
        logits = product(self.buffers["row_tile"], keys.transpose((1, 0)))
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
        return sums + product(self.buffers["powers"], values), new, total
