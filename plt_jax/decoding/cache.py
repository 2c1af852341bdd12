"""The decoding state of a batch of sequences, and the parameters laid out for decoding.

Per sequence: loop 1's keys and values (one such cache per loop only in the schemes that share
nothing), a ring of the last W keys and values per layer for each later loop with a window, and the
vector that each loop but the last hands to the next position. No second full cache exists.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig

Params = dict[str, Any]
LayerArrays = tuple[jax.Array, ...]


@flax.struct.dataclass
class Cache:
    """Decoding state of B sequences; tuples hold one array per layer."""

    lengths: jax.Array
    """int32 [B]: tokens processed."""
    keys: LayerArrays
    """[B, R, K, S, H]: R = 1 (loop 1's, shared by all loops) or L (each loop its own)."""
    values: LayerArrays
    """As keys."""
    ring_keys: LayerArrays
    """[B, L-1, K, W, H]: the last W keys of loops 2..L; position p is in slot p mod W. Empty
    without a window."""
    ring_values: LayerArrays
    """As ring_keys."""
    carried: jax.Array
    """[B, L-1, D]: what loops 1..L-1 handed on at the last position; zero at the start. [B, 0, D]
    in the schemes without a shift."""

    @property
    def capacity(self) -> int:
        """Tokens that fit, S."""
        return self.keys[0].shape[3]


def init_cache(
    config: ModelConfig, batch: int, max_length: int, dtype: jnp.dtype | str | None = None
) -> Cache:
    """An empty cache for `batch` sequences of at most `max_length` tokens.

    Args:
      dtype: of keys, values and carried vectors; default the model's compute dtype.

    Raises:
      ValueError: a size below 1.
    """
    if batch < 1 or max_length < 1:
        raise ValueError(
            f"a cache needs batch and max_length of at least 1, got {batch}, {max_length}"
        )
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    loop = config.loop
    K, H = config.kv_heads, config.head_width
    full = (batch, loop.count if loop.later_attention == "own" else 1, K, max_length, H)
    ring = (batch, loop.count - 1, K, loop.window, H)
    windowed_layers = config.layers if loop.later_attention == "gated" and loop.count > 1 else 0

    def zeros(shape: tuple[int, ...], layers: int) -> LayerArrays:
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    return Cache(
        lengths=jnp.zeros((batch,), jnp.int32),
        keys=zeros(full, config.layers),
        values=zeros(full, config.layers),
        ring_keys=zeros(ring, windowed_layers),
        ring_values=zeros(ring, windowed_layers),
        carried=jnp.zeros((batch, loop.count - 1 if loop.shifted else 0, config.width), dtype),
    )


def prepare_for_decode(config: ModelConfig, params: Params) -> Params:
    """Parameters laid out for decoding: one dict per layer, projections in the compute dtype.

    Decoding reads every weight once a step, so slices of stacked layers and casts would be copies.
    Do this once, outside jit. Prepared parameters are returned as they are.
    """
    if isinstance(params["layers"], tuple):
        return params
    params = nn.unbox(params)

    def cast(weight: jax.Array) -> jax.Array:
        return weight.astype(config.dtype) if weight.ndim > 1 else weight

    layers = tuple(
        {name: cast(stacked[j]) for name, stacked in params["layers"].items()}
        for j in range(config.layers)
    )
    return {name: cast(weight) for name, weight in params.items() if name != "layers"} | {
        "layers": layers
    }


def write(
    cache_BRKSH: jax.Array, new_BRKTH: jax.Array, slots_BT: jax.Array, first_row: int = 0
) -> jax.Array:
    """Writes T keys or values of loops `first_row`, ... into their slots.

    A slot at or beyond S is dropped (a negative one would wrap around: no caller makes one).
    """
    rows = jnp.arange(cache_BRKSH.shape[0])[:, None]
    loops = slice(first_row, first_row + new_BRKTH.shape[1])
    new_BTRKH = jnp.moveaxis(new_BRKTH, 3, 1).astype(cache_BRKSH.dtype)
    return cache_BRKSH.at[rows, loops, :, slots_BT].set(new_BTRKH, mode="drop")


def ring_positions(lengths_B: jax.Array, window: int) -> jax.Array:
    """The position held by each slot of a ring after `lengths` tokens, [B, W]; negative: none."""
    last_B1 = lengths_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(window)[None, :]) % window
