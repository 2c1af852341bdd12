"""Prefill: the next chunk of every sequence, parallel over positions and serial over loops.

A chunk may start anywhere, so a prompt can come in any split of chunks and decode steps. With
chunks of one token it is also the serial decode step of the schemes that have no shift.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import Cache, Params, prepare_for_decode, ring_positions, write
from plt_jax.model.attention import blend, masked_attention
from plt_jax.model.block import apply_block
from plt_jax.model.layers import Rotation, embed, logits_from, rms_norm, rope_rotation
from plt_jax.model.looping import loop_input


@partial(jax.jit, static_argnums=0)
def prefill(
    config: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Appends a chunk to every sequence.

    Args:
      params: as `Transformer.init` gives them, or as `prepare_for_decode` lays them out.
      tokens: int32 [B, C], padded on the right.
      lengths: int32 [B], how many tokens of each row are real, 0 to C. Tokens beyond the cache's
        capacity are lost: callers make sure that they fit.
      cache: unchanged; wrap the call in a jit that donates it to update it in place.

    Returns:
      The logits of each sequence's last real token, float32 [B, V] (of no meaning where the length
      is 0), and the cache after the chunk.

    Raises:
      ValueError: the chunk is longer than the cache, or batch sizes disagree.
    """
    check_batch(tokens, cache)
    B, C = tokens.shape
    if lengths.shape != (B,):
        raise ValueError(f"lengths must have shape ({B},), got {lengths.shape}")
    if not 1 <= C <= cache.capacity:
        raise ValueError(f"a chunk of {C} tokens does not fit a cache of {cache.capacity}")
    params = prepare_for_decode(config, params)
    loop = config.loop
    positions_BC = cache.lengths[:, None] + jnp.arange(C)
    rotation = rope_rotation(config, positions_BC)
    embeddings_BCD = embed(tokens, params["embedding"], jnp.dtype(config.dtype))
    last_B = jnp.maximum(lengths - 1, 0)

    x_BCD, carried = embeddings_BCD, []
    for index in range(loop.count):
        if index > 0:
            if loop.shifted:
                before_B1D = cache.carried[:, index - 1 : index].astype(x_BCD.dtype)
                carried.append(_last_or(x_BCD, last_B, lengths, before_B1D))
                x_BCD = jnp.concatenate([before_B1D, x_BCD[:, :-1]], axis=1)
            x_BCD = loop_input(loop, embeddings_BCD, x_BCD)
        x_BCD, cache = _run_loop(
            config, params, index, x_BCD, positions_BC, lengths, rotation, cache
        )
        if loop.normalize_between_loops or index == loop.count - 1:
            x_BCD = rms_norm(x_BCD, params["final_norm"], config.norm_epsilon)
    if carried:
        cache = cache.replace(carried=jnp.concatenate(carried, axis=1).astype(cache.carried.dtype))
    last_B1D = jnp.take_along_axis(x_BCD, last_B[:, None, None], axis=1)
    logits_B1V = logits_from(last_B1D, params["embedding"], params.get("head"))
    return logits_B1V[:, 0], cache.replace(lengths=cache.lengths + lengths)


def check_batch(tokens: jax.Array, cache: Cache) -> None:
    """Raises ValueError where the tokens' batch is not the cache's."""
    if tokens.shape[0] != cache.lengths.shape[0]:
        raise ValueError(
            f"tokens of shape {tokens.shape} do not match a cache of {cache.lengths.shape[0]} "
            "sequences"
        )


def _last_or(
    x_BCD: jax.Array, last_B: jax.Array, lengths_B: jax.Array, before_B1D: jax.Array
) -> jax.Array:
    """The state at each row's last real token, or `before` where the row has none, [B, 1, D]."""
    last_B1D = jnp.take_along_axis(x_BCD, last_B[:, None, None], axis=1)
    return jnp.where((lengths_B > 0)[:, None, None], last_B1D, before_B1D)


def _run_loop(
    config: ModelConfig,
    params: Params,
    index: int,
    x_BCD: jax.Array,
    positions_BC: jax.Array,
    lengths_B: jax.Array,
    rotation: Rotation,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """One loop (0 for the first) over the chunk: its raw output, and the cache with its keys."""
    loop = config.loop
    own = index == 0 or loop.later_attention == "own"
    row = index if own else 0
    real_BC = jnp.arange(x_BCD.shape[1]) < lengths_B[:, None]
    slots_BC = jnp.where(real_BC, positions_BC, cache.capacity)
    mask_BCS = jnp.arange(cache.capacity) <= positions_BC[:, :, None]
    keys, values = list(cache.keys), list(cache.values)
    ring_keys, ring_values = list(cache.ring_keys), list(cache.ring_values)
    window_mask, ring_slots_BC = _window_of_chunk(
        loop.window, positions_BC, real_BC, lengths_B, cache
    )

    for layer, weights in enumerate(params["layers"]):

        def attend(q, k, v, gate_BNT, layer=layer):
            if own:
                for cached, new in ((keys, k), (values, v)):
                    cached[layer] = write(cached[layer], new[:, None], slots_BC, row)
            everything = masked_attention(
                q,
                keys[layer][:, row].astype(q.dtype),
                values[layer][:, row].astype(q.dtype),
                mask_BCS,
            )
            if own or loop.later_attention == "shared":
                return everything
            seen = []
            for ring, new in ((ring_keys, k), (ring_values, v)):
                held = ring[layer][:, index - 1]
                seen.append(jnp.concatenate([held.astype(new.dtype), new], axis=2))
                ring[layer] = write(ring[layer], new[:, None], ring_slots_BC, index - 1)
            return blend(gate_BNT, everything, masked_attention(q, *seen, window_mask))

        x_BCD, _ = apply_block(config, weights, x_BCD, rotation, attend)
    return x_BCD, cache.replace(
        keys=tuple(keys),
        values=tuple(values),
        ring_keys=tuple(ring_keys),
        ring_values=tuple(ring_values),
    )


def _window_of_chunk(
    window: int,
    positions_BC: jax.Array,
    real_BC: jax.Array,
    lengths_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, jax.Array]:
    """What a chunk's windows see, and where its keys go in the rings.

    Returns:
      A mask [B, C, W + C] over the ring's slots followed by the chunk's own keys, and the ring's
      slots [B, C] of the chunk's keys: of those that later ones overwrite, none.
    """
    held_BW = ring_positions(cache.lengths, window)
    seen_BS = jnp.concatenate([held_BW, positions_BC], axis=1)[:, None, :]
    distance = positions_BC[:, :, None] - seen_BS
    mask = (distance >= 0) & (distance < window) & (seen_BS >= 0)
    kept_BC = real_BC & (positions_BC >= (cache.lengths + lengths_B)[:, None] - window)
    return mask, jnp.where(kept_BC, positions_BC % window, window)
