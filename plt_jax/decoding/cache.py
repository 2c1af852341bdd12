"""The decoding state of a batch of sequences.

Per sequence there are: the keys and values of loop 1 (of every loop in the schemes that share
nothing); per layer a ring of the last W keys and values for each later loop that has a window; and
the output of each loop but the last at the newest position. No second full cache exists.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.config import ModelConfig
from plt_jax.decoding.options import DTYPES
from plt_jax.decoding.placement import placement
from plt_jax.distributed.axes import mesh_is_active, shard
from plt_jax.errors import InputError
from plt_jax.model.kernels import traced_platform


class Quantized(flax.struct.PyTreeNode):
    """Keys or values in eight bits, with one scale per position and head."""

    values: jax.Array
    """int8 [B, K, S, H]: the numbers divided by their scale, rounded."""
    scales: jax.Array
    """float32 [B, K, S, 1]: the largest magnitude of a head's numbers at a position, over 127."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Stored = jax.Array | Quantized
"""Keys or values [B, K, S, H] as a cache holds them."""


class Cache(flax.struct.PyTreeNode):
    """Decoding state of B sequences; the outer tuples hold one entry per layer."""

    lengths: jax.Array
    """int32 [B], the number of tokens processed."""
    keys: tuple[tuple[Stored, ...], ...]
    """[B, K, S, H] for each of R loops: R = 1 (loop 1, shared by all loops) or L (each its own).
    They are separate arrays, so that the keys of one loop are read without a copy."""
    values: tuple[tuple[Stored, ...], ...]
    """The values, in the shapes of `keys`."""
    ring_keys: tuple[jax.Array, ...]
    """[B, L-1, K, W, H]: the last W keys of loops 2..L, with W at most S; position p is in slot
    p mod W. Empty without a window."""
    ring_values: tuple[jax.Array, ...]
    """The values, in the shapes of `ring_keys`."""
    carried: jax.Array
    """[B, L-1, D], the outputs of loops 1..L-1 at the newest position; zero at the start. [B, 0, D]
    in the schemes without a shift."""

    @property
    def capacity(self) -> int:
        """Number of tokens that fit, S."""
        return self.keys[0][0].shape[2]

    def layers(self) -> list[LayerCache]:
        """The cache of each layer."""
        none = (None,) * len(self.keys)
        return [
            LayerCache(*arrays)
            for arrays in zip(
                self.keys,
                self.values,
                self.ring_keys or none,
                self.ring_values or none,
                strict=True,
            )
        ]

    def with_layers(self, layers: list[LayerCache]) -> Cache:
        """The cache with its layers replaced."""
        keys, values, *rings = zip(*layers, strict=True)
        ring_keys, ring_values = rings if self.ring_keys else ((), ())
        return self.replace(keys=keys, values=values, ring_keys=ring_keys, ring_values=ring_values)


class LayerCache(NamedTuple):
    """The cache of one layer; see `Cache`."""

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    ring_keys: jax.Array | None
    ring_values: jax.Array | None

    def rings(self) -> tuple[jax.Array, jax.Array]:
        """The rings' keys and values [B, L-1, K, W, H] each, in a scheme that has them."""
        assert self.ring_keys is not None and self.ring_values is not None
        return self.ring_keys, self.ring_values


def init_cache(
    config: ModelConfig, batch: int, max_length: int, dtype: jnp.dtype | str | None = None
) -> Cache:
    """An empty cache for `batch` sequences of at most `max_length` tokens.

    Under a mesh it is placed as placement.py says, and each device makes its own part.

    Args:
      dtype: "float32" or "bfloat16", for keys, values and carried outputs; or "int8", for the keys
        and values of the full cache, with one float32 scale per head and position, while rings and
        carried outputs have the compute dtype. Default: the model's compute dtype.

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
    near = jnp.dtype(config.dtype) if eight_bits else dtype
    loop = config.loop
    K, H = config.kv_heads, config.head_width
    rows = loop.count if loop.later_attention == "own" else 1
    ring = (batch, loop.count - 1, K, min(loop.window, max_length), H)
    windowed_layers = config.layers if loop.later_attention == "gated" and loop.count > 1 else 0

    def stored() -> Stored:
        values = jnp.zeros((batch, K, max_length, H), dtype)
        if not eight_bits:
            return values
        return Quantized(values, jnp.zeros((batch, K, max_length, 1), jnp.float32))

    def full() -> tuple[tuple[Stored, ...], ...]:
        return tuple(tuple(stored() for _ in range(rows)) for _ in range(config.layers))

    def rings() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(ring, near) for _ in range(windowed_layers))

    return Cache(
        lengths=jnp.zeros((batch,), jnp.int32),
        keys=full(),
        values=full(),
        ring_keys=rings(),
        ring_values=rings(),
        carried=jnp.zeros((batch, loop.count - 1 if loop.shifted else 0, config.width), near),
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_on_mesh(config: ModelConfig, batch: int, max_length: int, dtype_name: str) -> Cache:
    return shard_cache(_empty(config, batch, max_length, dtype_name))


def shard_cache(cache: Cache) -> Cache:
    """The cache, sharded over the current mesh if there is one."""
    if not mesh_is_active():
        return cache
    batch, kv_heads = cache.keys[0][0].shape[:2]
    where = placement(batch, kv_heads, cache.capacity)

    def sharded(tree, spec: PartitionSpec):
        return jax.tree.map(lambda array: shard(array, *spec), tree)

    return Cache(
        lengths=sharded(cache.lengths, PartitionSpec(where.batch)),
        keys=sharded(cache.keys, where.full),
        values=sharded(cache.values, where.full),
        ring_keys=sharded(cache.ring_keys, where.ring),
        ring_values=sharded(cache.ring_values, where.ring),
        carried=sharded(cache.carried, PartitionSpec(where.batch)),
    )


def write(stored: Stored, new_BKTH: jax.Array, slots_BT: jax.Array) -> Stored:
    """Writes T keys or values of every sequence into their slots.

    Writes to slots at or beyond S are dropped. No caller gives a negative slot, which would wrap.
    """
    if isinstance(stored, Quantized):
        return jax.tree.map(
            lambda array, new: write(array, new, slots_BT), stored, quantize(new_BKTH)
        )
    if new_BKTH.shape[2] == 1 and traced_platform() == "tpu":
        return _write_one(stored, new_BKTH.astype(stored.dtype), slots_BT[:, 0])
    rows = jnp.arange(stored.shape[0])[:, None]
    new_BTKH = new_BKTH.swapaxes(1, 2).astype(stored.dtype)
    return _written(stored.at[rows, :, slots_BT].set(new_BTKH, mode="drop"))


def _write_one(stored: jax.Array, new_BK1H: jax.Array, slots_B: jax.Array) -> jax.Array:
    """Does what `write` does, sequence by sequence: for a scatter, a TPU copies the whole cache."""

    def write_row(row: jax.Array, stored: jax.Array) -> jax.Array:
        at = (row, 0, jnp.minimum(slots_B[row], stored.shape[2] - 1), 0)
        new = jax.lax.dynamic_slice_in_dim(new_BK1H, row, 1)
        old = jax.lax.dynamic_slice(stored, at, new.shape)
        kept = jnp.where(slots_B[row] < stored.shape[2], new, old)
        return jax.lax.dynamic_update_slice(stored, kept, at)

    return jax.lax.fori_loop(0, stored.shape[0], write_row, stored)


def quantize(x_BKTH: jax.Array) -> Quantized:
    """Rounds to eight bits per number, symmetric around zero."""
    wide = x_BKTH.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    values = jnp.round(wide / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny))
    return Quantized(values.astype(jnp.int8), scales)


def write_rings(
    ring_BRKWH: jax.Array, new_BRKTH: jax.Array, slots_BT: jax.Array, first: int
) -> jax.Array:
    """Writes T keys or values of R rings, from ring `first` on, into their slots.

    Writes to slots at or beyond W are dropped.
    """
    rows = jnp.arange(ring_BRKWH.shape[0])[:, None]
    rings = slice(first, first + new_BRKTH.shape[1])
    new_BTRKH = jnp.moveaxis(new_BRKTH, 3, 1).astype(ring_BRKWH.dtype)
    return _written(ring_BRKWH.at[rows, rings, :, slots_BT].set(new_BTRKH, mode="drop"))


def _written(array: jax.Array) -> jax.Array:
    """Keeps XLA from fusing a write into its reader.

    Fused, a CPU writes a second time, into a copy. On a TPU the barrier itself would cost a copy.
    """
    return jax.lax.optimization_barrier(array) if traced_platform() == "cpu" else array


def ring_positions(lengths_B: jax.Array, window: int) -> jax.Array:
    """The position in each slot of a ring after `lengths` tokens, [B, W]; negative where empty."""
    last_B1 = lengths_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(window)[None, :]) % window
