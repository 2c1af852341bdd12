"""Prefill: the next chunk of every sequence, parallel over positions and serial over loops.

A chunk may start anywhere, so a prompt can come in any split of chunks and decode steps.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.decoding.attention import attend_causally, attend_where_held, attend_window
from plt_jax.decoding.cache import Cache, LayerCache, placed, write, write_rings
from plt_jax.decoding.checks import check_chunk
from plt_jax.decoding.layout import (
    PREPARED_LAYOUT,
    Params,
    lay_rows,
    logits_of,
    prepare_for_decode,
)
from plt_jax.decoding.placement import Part
from plt_jax.model.attention import blend, choose_backend
from plt_jax.model.block import apply_block
from plt_jax.model.kernels import Backend
from plt_jax.model.layers import Rotation, embed, rms_norm, rope_rotation
from plt_jax.model.looping import loop_input
from plt_jax.model.moe import of_loops


def prefill(
    config: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Appends a chunk to every sequence.

    Args:
      params: as `Transformer.init` gives them, or as `prepare_for_decode` lays them out.
      tokens: int32 [B, C], padded on the right.
      lengths: int32 [B], how many tokens of each row are real, 0 to C.
      cache: unchanged; wrap the call in a jit that donates it to update it in place.

    Returns:
      The logits of each sequence's last real token, float32 [B, V] (of no meaning where the length
      is 0), and the cache after the chunk.

    Raises:
      InputError: shapes disagree, the chunk is longer than the cache, or, of values that are known
        (inside a jit of yours they are not, and such tokens are lost or wrong), tokens outside the
        vocabulary or more of them than the cache has room for.
    """
    check_chunk(config, tokens, lengths, cache)
    return _prefill(config, params, tokens, lengths, cache)


@partial(jax.jit, static_argnums=0)
def _prefill(
    config: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    params = prepare_for_decode(config, params)
    loop = config.loop
    positions_BC = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
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
        x_BCD, cache = _run_loop(config, params, index, x_BCD, lengths, rotation, cache)
        if loop.normalize_between_loops or index == loop.count - 1:
            x_BCD = rms_norm(x_BCD, params["final_norm"], config.norm_epsilon)
    if carried:
        cache = cache.replace(carried=jnp.concatenate(carried, axis=1).astype(cache.carried.dtype))
    last_B1D = jnp.take_along_axis(x_BCD, last_B[:, None, None], axis=1)
    cache = placed(cache.replace(lengths=cache.lengths + lengths))
    return logits_of(params, last_B1D)[:, 0], cache


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
    lengths_B: jax.Array,
    rotation: Rotation,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """One loop (0 for the first) over the chunk: its raw output, and the cache with its keys."""
    attend_chunk = partial(_attend_chunk, config, index, choose_backend(config))
    layers = cache.layers()
    for layer, weights in enumerate(params["layers"]):

        def attend(q, k, v, gate_BNT, layer=layer):
            out, layers[layer] = attend_where_held(
                attend_chunk, q, k, v, gate_BNT, layers[layer], cache.lengths, lengths_B
            )
            return out

        weights = of_loops(weights, index)
        x_BCD, _ = apply_block(config, weights, lay_rows(x_BCD), rotation, attend, PREPARED_LAYOUT)
    return x_BCD, cache.with_layers(layers)


def _attend_chunk(
    config: ModelConfig,
    index: int,
    backend: Backend,
    q_BNCH: jax.Array,
    k_BKCH: jax.Array,
    v_BKCH: jax.Array,
    gate_BNC: jax.Array | None,
    held: LayerCache,
    before_B: jax.Array,
    lengths_B: jax.Array,
    part: Part,
) -> tuple[jax.Array, LayerCache]:
    """One layer's attention of a chunk in loop `index`; see `attend_where_held`."""
    loop = config.loop
    own = index == 0 or loop.later_attention == "own"
    row = index if own else 0
    capacity, C = held.keys[0].shape[2], q_BNCH.shape[2]
    real_BC = jnp.arange(C) < lengths_B[:, None]
    positions_BC = before_B[:, None] + jnp.arange(C)
    seen_BC = jnp.where(real_BC, positions_BC, 0)  # what is not real need not look far
    if own:
        slots_BC = jnp.where(real_BC, part.slots(positions_BC, capacity), capacity)
        keys, values = list(held.keys), list(held.values)
        keys[row], values[row] = (
            write(keys[row], k_BKCH, slots_BC),
            write(values[row], v_BKCH, slots_BC),
        )
        held = held._replace(keys=tuple(keys), values=tuple(values))
    everything = attend_causally(q_BNCH, held.keys[row], held.values[row], seen_BC, backend, part)
    if own or loop.later_attention == "shared":
        return everything, held
    rings = held.ring_keys, held.ring_values
    local = attend_window(
        q_BNCH, (k_BKCH, v_BKCH), tuple(ring[:, index - 1] for ring in rings), before_B
    )
    ring_slots_BC = ring_slots_of_chunk(rings[0].shape[3], positions_BC, lengths_B, before_B)
    ring_keys, ring_values = (
        write_rings(ring, new[:, None], ring_slots_BC, index - 1)
        for ring, new in zip(rings, (k_BKCH, v_BKCH), strict=True)
    )
    held = held._replace(ring_keys=ring_keys, ring_values=ring_values)
    return blend(gate_BNC, everything, local), held


def ring_slots_of_chunk(
    window: int, positions_BC: jax.Array, lengths_B: jax.Array, before_B: jax.Array
) -> jax.Array:
    """The ring's slot of each key of a chunk, [B, C]; W, which drops it, where none stays.

    Those are the keys that are not real and those that later ones of the chunk overwrite, since
    which of two writes to one slot stays is not defined.
    """
    end_B1 = (before_B + lengths_B)[:, None]
    kept_BC = (positions_BC < end_B1) & (positions_BC >= end_B1 - window)
    return jnp.where(kept_BC, positions_BC % window, window)
