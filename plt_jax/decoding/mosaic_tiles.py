"""Operations on tiles of a Mosaic GPU kernel: 64 rows, held by the 128 threads of a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plt_jax.decoding.mosaic_shape import ROWS

TILE = plgpu.Layout.WGMMA
"""Which thread holds which numbers of a tile: as Hopper's products have it."""


def product(a, b) -> jax.Array:
    """The product of two tiles in shared memory, summed in float32."""

    def run(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(run, accumulator((a.shape[0], b.shape[1]), jnp.float32))


def indices(shape: tuple[int, ...], axis: int) -> jax.Array:
    """The numbers of a tile's rows or columns."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)


def remainder(x: jax.Array, divisor: int) -> jax.Array:
    return jax.lax.rem(x, jnp.full_like(x, divisor))


def quotient(x: jax.Array, divisor: int) -> jax.Array:
    return jax.lax.div(x, jnp.full_like(x, divisor))


def load_plain(ref, layout) -> jax.Array:
    """What a buffer without tiles holds."""
    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]


def store_plain(ref, x: jax.Array) -> None:
    """Stores to a buffer without tiles."""
    plgpu.store(ref, x, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]


def row_vector(ref) -> jax.Array:
    """A vector as a tile whose rows are all equal."""
    vector = load_plain(ref, TILE.reduce(0))
    return jax.lax.broadcast_in_dim(vector, (ROWS, *vector.shape), [1])
