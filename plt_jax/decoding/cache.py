"""The decoding state of a batch of sequences.

Per sequence there are: in each layer one array of slots for keys and one for values; and the output
of each loop but the last at the newest position. The slots are loop 1's, one for each position, and
behind them W for each later loop that has a window. No second full cache exists. (In the schemes
that share nothing, every loop has arrays of its own.)
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.config import ModelConfig
from plt_jax.config.model import Part
from plt_jax.decoding.options import DTYPES
from plt_jax.decoding.placement import placement, slots_multiple
from plt_jax.decoding.quantization import Quantized, quantize
from plt_jax.distributed.axes import mesh_is_active, shard
from plt_jax.errors import InputError
from plt_jax.model.kernels import traced_platform

GPU_SLOTS = 64
"""On GPUs the number of slots is a multiple of this. Where it is not, XLA pads the products over
slots with copies of the whole cache."""
FEW_SLOTS = 8
"""Up to this number of slots CPUs and TPUs write one after another."""


Stored = jax.Array | Quantized
"""Keys or values [B, K, slots, H] as a cache holds them; in eight bits with one scale for each head
and slot."""


class Slots(NamedTuple):
    """Which slot holds which position of which loop."""

    capacity: int
    """S, the number of positions that fit."""
    window: int
    """W, at most S: the number of positions that a later loop keeps. 0 without windows."""
    count: int
    """The number of slots: S + (L-1)·W, or S in the schemes without windows."""

    def of(self, loop: int, positions: jax.Array) -> jax.Array:
        """The slots of a loop's keys at positions; `count` for positions that do not fit.

        Args:
          loop: 0 for the loop whose keys are shared, or for one that has arrays of its own.
        """
        if loop > 0:
            return self.start(loop) + positions % self.window
        return jnp.where(positions < self.capacity, positions, self.count)

    def start(self, loop: int) -> int:
        """The first slot of the window of a later loop."""
        return self.capacity + (loop - 1) * self.window

    def seen(self, loops: range, positions_B: jax.Array, slot_S: jax.Array) -> jax.Array:
        """Which slots of its loop's window a row sees, bool [B, R, S]; none if it is of loop 0.

        Args:
          loops: the loop of each of R rows.
          positions_B: the newest position in the cache, of all rows of a sequence.
          slot_S: the numbers of the slots.
        """
        start_R1 = jnp.array([[self.start(loop) if loop else self.count] for loop in loops])
        offset_RS = slot_S - start_R1
        # A window that is not full yet holds the positions from 0 on.
        newest_B11 = jnp.minimum(positions_B, self.window - 1)[:, None, None]
        return (offset_RS >= 0) & (offset_RS <= newest_B11)


def slots_for(config: ModelConfig, batch: int, max_length: int) -> tuple[Slots, Slots]:
    """The slots of a looped layer's arrays, and those of another's, for sequences of at least
    `max_length` tokens.

    Their number is a multiple of the devices that they are split over, and of GPU_SLOTS on GPUs.
    """
    loop = config.loop
    windows = loop.count - 1 if loop.later_attention == "gated" else 0
    alone = GPU_SLOTS if traced_platform() == "gpu" else 1
    multiple = math.lcm(alone, slots_multiple(batch, config.kv_heads))
    capacity = max_length
    while True:
        window = min(loop.window, capacity) if windows else 0
        count = capacity + windows * window
        if count % multiple == 0:
            outer = -(-capacity // multiple) * multiple  # the last ones may stay empty
            return Slots(capacity, window, count), Slots(capacity, 0, outer)
        capacity += 1


class Cache(flax.struct.PyTreeNode):
    """Decoding state of B sequences; the outer tuples hold one entry per layer."""

    slots: Slots = flax.struct.field(pytree_node=False)
    """What the slots of the looped layers' `keys` and `values` hold."""
    outer_slots: Slots = flax.struct.field(pytree_node=False)
    """What the slots of the other layers hold."""
    lengths: jax.Array
    """int32 [B], the number of tokens processed."""
    keys: tuple[tuple[Stored, ...], ...]
    """[B, K, slots, H] for each of R loops: R = 1 (shared by all loops), or L (each its own), and 1
    in layers that do not loop. They are separate arrays, so that the keys of one loop are read
    without a copy."""
    values: tuple[tuple[Stored, ...], ...]
    """The values, in the shapes of `keys`."""
    carried: jax.Array
    """[B, L-1, D], the outputs of loops 1..L-1 at the newest position; zero at the start. [B, 0, D]
    in the schemes without a shift."""

    @property
    def capacity(self) -> int:
        """Number of tokens that fit, S."""
        return self.slots.capacity

    def slots_in(self, part: Part) -> Slots:
        """What the slots of a part's layers hold."""
        return self.slots if part == "core" else self.outer_slots

    def layers(self) -> list[LayerCache]:
        """The cache of each layer."""
        return [LayerCache(*arrays) for arrays in zip(self.keys, self.values, strict=True)]

    def with_layers(self, layers: list[LayerCache]) -> Cache:
        """The cache with its layers replaced."""
        keys, values = zip(*layers, strict=True)
        return self.replace(keys=keys, values=values)


class LayerCache(NamedTuple):
    """The cache of one layer; see `Cache`."""

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]


def init_cache(
    config: ModelConfig, batch: int, max_length: int, dtype: jnp.dtype | str | None = None
) -> Cache:
    """An empty cache for `batch` sequences of at most `max_length` tokens.

    Under a mesh it is placed as placement.py says, and each device makes its own part. There, and
    on GPUs, the capacity may be a little larger than asked for; see `slots_for`.

    Args:
      dtype: "float32" or "bfloat16", for keys, values and carried outputs; or "int8", for keys and
        values, with one float32 scale per head and slot, while carried outputs have the compute
        dtype. Default: the model's compute dtype.

    Raises:
      InputError: a size below 1, or another dtype.
    """
    if batch < 1 or max_length < 1:
        raise InputError(
            f"a cache needs batch and max_length of at least 1, got {batch}, {max_length}"
        )
    name = config.dtype if dtype is None else dtype
    name = name if isinstance(name, str) else jnp.dtype(name).name
    if name not in DTYPES:
        raise InputError(f"cache dtype is {name}; it must be one of {', '.join(DTYPES)}")
    empty = _empty_on_mesh if mesh_is_active() else _empty
    return empty(config, batch, max_length, name)


def _empty(config: ModelConfig, batch: int, max_length: int, dtype_name: str) -> Cache:
    dtype = jnp.dtype(dtype_name)
    eight_bits = dtype == jnp.int8
    loop, (slots, outer_slots) = config.loop, slots_for(config, batch, max_length)
    K, H = config.kv_heads, config.head_width
    rows = loop.count if loop.later_attention == "own" else 1

    def stored(count: int) -> Stored:
        values = jnp.zeros((batch, K, count, H), dtype)
        if not eight_bits:
            return values
        return Quantized(values, jnp.zeros((batch, K, count, 1), jnp.float32))

    def layer(index: int) -> tuple[Stored, ...]:
        if index not in config.looped_layers:
            return (stored(outer_slots.count),)
        return tuple(stored(slots.count) for _ in range(rows))

    def layers() -> tuple[tuple[Stored, ...], ...]:
        return tuple(layer(index) for index in range(config.layers))

    carried = (batch, loop.count - 1 if loop.shifted else 0, config.width)
    return Cache(
        slots=slots,
        outer_slots=outer_slots,
        lengths=jnp.zeros((batch,), jnp.int32),
        keys=layers(),
        values=layers(),
        carried=jnp.zeros(carried, jnp.dtype(config.dtype) if eight_bits else dtype),
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_on_mesh(config: ModelConfig, batch: int, max_length: int, dtype_name: str) -> Cache:
    return shard_cache(_empty(config, batch, max_length, dtype_name))


def shard_cache(cache: Cache) -> Cache:
    """The cache, sharded over the current mesh if there is one."""
    if not mesh_is_active():
        return cache
    batch = placement(*cache.keys[0][0].shape[:3]).batch

    def stored(array: jax.Array) -> jax.Array:
        return shard(array, *placement(*array.shape[:3]).stored)

    return cache.replace(
        lengths=shard(cache.lengths, batch),
        keys=jax.tree.map(stored, cache.keys),
        values=jax.tree.map(stored, cache.values),
        carried=shard(cache.carried, batch),
    )


def write(
    stored: Stored, new_BKTH: jax.Array, slots_BT: jax.Array, all_exist: bool = False
) -> Stored:
    """Writes T keys or values of every sequence into their slots.

    Args:
      slots_BT: none is negative, which would wrap. Writes to slots beyond the last are dropped.
      all_exist: a promise that no slot lies beyond the last.
    """
    if isinstance(stored, Quantized):
        return jax.tree.map(
            lambda array, new: write(array, new, slots_BT, all_exist), stored, quantize(new_BKTH)
        )
    if all_exist and slots_BT.size <= (1 if traced_platform() == "gpu" else FEW_SLOTS):
        # Of a scatter of one slot a GPU makes this update, too, but reads the slot first, in a
        # kernel of its own. Of a scatter of few slots a CPU makes a loop, and a TPU a copy.
        for row, column in np.ndindex(slots_BT.shape):
            new = new_BKTH[row : row + 1, :, column : column + 1].astype(stored.dtype)
            at = (row, 0, slots_BT[row, column], 0)
            stored = jax.lax.dynamic_update_slice(stored, new, at)
        return _written(stored)
    if new_BKTH.shape[2] <= FEW_SLOTS and traced_platform() == "tpu":
        return _write_in_turn(stored, new_BKTH.astype(stored.dtype), slots_BT)
    rows = jnp.arange(stored.shape[0])[:, None]
    new_BTKH = new_BKTH.swapaxes(1, 2).astype(stored.dtype)
    mode = "promise_in_bounds" if all_exist else "drop"
    return _written(stored.at[rows, :, slots_BT].set(new_BTKH, mode=mode))


def _write_in_turn(stored: jax.Array, new_BKTH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """Does what `write` does, slot by slot: for a scatter, a TPU copies the whole cache."""
    B, K, T, H = new_BKTH.shape

    def write_slot(index: jax.Array, stored: jax.Array) -> jax.Array:
        row, column = index // T, index % T
        slot = slots_BT[row, column]
        at = (row, 0, jnp.minimum(slot, stored.shape[2] - 1), 0)
        new = jax.lax.dynamic_slice(new_BKTH, (row, 0, column, 0), (1, K, 1, H))
        old = jax.lax.dynamic_slice(stored, at, new.shape)
        kept = jnp.where(slot < stored.shape[2], new, old)
        return jax.lax.dynamic_update_slice(stored, kept, at)

    return jax.lax.fori_loop(0, B * T, write_slot, stored)


def read(stored: Stored, slots_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The keys or values in T slots of every sequence, [B, K, T, H]; zero beyond the last slot."""

    def taken(array: jax.Array) -> jax.Array:
        rows = jnp.arange(array.shape[0])[:, None]
        return array.at[rows, :, slots_BT].get(mode="fill", fill_value=0).swapaxes(1, 2)

    if isinstance(stored, Quantized):
        return jax.tree.map(taken, stored).dequantized(dtype)
    return taken(stored).astype(dtype)


def _written(array: jax.Array) -> jax.Array:
    """Keeps XLA from fusing a write into its reader.

    Fused, a CPU writes a second time, into a copy. On a TPU the barrier itself would cost a copy.
    """
    return jax.lax.optimization_barrier(array) if traced_platform() == "cpu" else array
