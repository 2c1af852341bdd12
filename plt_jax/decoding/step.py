"""The decode step: one token of every sequence, all loops in ONE pass of the stack.

With the shift, loop l at position i needs only the previous loop's state at position i - 1, which
the step before left behind (Algorithm 1 of the PLT paper). So the rows a·E[i] + b·H^(l-1)[i-1] of
all loops go through the layers together: each weight is read once for all loops, and so is loop 1's
cache, because the loops are just more queries at the same position.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.decoding.attention import attend, attend_own, attend_where_held
from plt_jax.decoding.cache import (
    Cache,
    LayerCache,
    Stored,
    placed,
    ring_positions,
    write,
    write_rings,
)
from plt_jax.decoding.checks import check_step
from plt_jax.decoding.layout import (
    PREPARED_LAYOUT,
    Params,
    lay_rows,
    logits_of,
    prepare_for_decode,
)
from plt_jax.decoding.placement import Part
from plt_jax.model.attention import blend
from plt_jax.model.block import apply_block
from plt_jax.model.layers import embed, rms_norm, rope_rotation
from plt_jax.model.looping import loop_input
from plt_jax.model.moe import of_loops


def decode_step(
    config: ModelConfig, params: Params, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Appends one token to every sequence.

    Schemes without a shift cannot run their loops together and take one pass per loop.

    Args:
      params: as `prepare_for_decode` lays them out (fast), or as `Transformer.init` gives them.
      tokens: int32 [B].
      cache: unchanged; wrap the call in a jit that donates it to update it in place.

    Returns:
      Logits of the next token, float32 [B, V], and the cache after this one.

    Raises:
      InputError: batch sizes disagree, or, of values that are known (inside a jit of yours they are
        not, and such a token is lost or wrong), a token outside the vocabulary or a sequence that
        fills the cache already.
    """
    check_step(config, tokens, cache)
    return _decode_step(config, params, tokens, cache)


@partial(jax.jit, static_argnums=0)
def _decode_step(
    config: ModelConfig, params: Params, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    params = prepare_for_decode(config, params)
    loop = config.loop
    E_B1D = embed(tokens[:, None], params["embedding"], jnp.dtype(config.dtype))
    if loop.shifted or loop.count == 1:
        later_BLD = loop_input(loop, E_B1D, cache.carried.astype(E_B1D.dtype))
        x_BLD = jnp.concatenate([E_B1D, later_BLD], axis=1) if loop.count > 1 else E_B1D
        raw_BLD, cache = _run_rows(config, params, range(loop.count), x_BLD, cache)
        normed_BLD = rms_norm(raw_BLD, params["final_norm"], config.norm_epsilon)
        handed_BLD = normed_BLD if loop.normalize_between_loops else raw_BLD
        carried_BLD = handed_BLD[:, : cache.carried.shape[1]].astype(cache.carried.dtype)
        cache, last_B1D = cache.replace(carried=carried_BLD), normed_BLD[:, -1:]
    else:
        last_B1D = E_B1D
        for index in range(loop.count):
            last_B1D, cache = _run_rows(config, params, range(index, index + 1), last_B1D, cache)
            if loop.normalize_between_loops or index == loop.count - 1:
                last_B1D = rms_norm(last_B1D, params["final_norm"], config.norm_epsilon)
    return logits_of(params, last_B1D)[:, 0], placed(cache.replace(lengths=cache.lengths + 1))


def _run_rows(
    config: ModelConfig, params: Params, loops: range, x_BRD: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """All layers over one row per loop of `loops`: raw outputs [B, R, D], and the cache after."""
    rotation = rope_rotation(config, cache.lengths[:, None])
    layers = cache.layers()
    for layer, declared in enumerate(params["layers"]):

        def attend(q, k, v, gate_BNR, layer=layer):
            out, layers[layer] = attend_where_held(
                partial(_attend_rows, config, loops),
                *(q, k, v, gate_BNR),
                layers[layer],
                cache.lengths,
            )
            return out

        weights = of_loops(declared, jnp.arange(loops.start, loops.stop))
        x_BRD, _ = apply_block(config, weights, lay_rows(x_BRD), rotation, attend, PREPARED_LAYOUT)
    return x_BRD, cache.with_layers(layers)


def _attend_rows(
    config: ModelConfig,
    loops: range,
    q_BNRH: jax.Array,
    k_BKRH: jax.Array,
    v_BKRH: jax.Array,
    gate_BNR: jax.Array | None,
    held: LayerCache,
    lengths_B: jax.Array,
    part: Part,
) -> tuple[jax.Array, LayerCache]:
    """One layer's attention of one row per loop, all at the position behind `lengths`; see
    `attend_where_held`."""
    loop = config.loop
    capacity, slots_B1 = held.keys[0].shape[2], lengths_B[:, None]
    own_B1 = part.slots(slots_B1, capacity)
    mask_B1S = part.start + jnp.arange(capacity) <= slots_B1[:, :, None]
    later = [row for row, index in enumerate(loops) if index > 0]

    def written(stored: tuple[Stored, ...], new_BKRH: jax.Array, rows: dict[int, int]):
        """With the new rows of some loops, by loop."""
        return tuple(
            write(old, new_BKRH[:, :, rows[index] : rows[index] + 1], own_B1)
            if index in rows
            else old
            for index, old in enumerate(stored)
        )

    own = loop.later_attention == "own"
    rows = {index: row for row, index in enumerate(loops) if own or index == 0}
    held = held._replace(
        keys=written(held.keys, k_BKRH, rows), values=written(held.values, v_BKRH, rows)
    )
    if own:
        outs = [
            attend(
                *(q_BNRH[:, :, row : row + 1], held.keys[index], held.values[index], mask_B1S),
                part.axes,
            )
            for index, row in rows.items()
        ]
        return jnp.concatenate(outs, axis=2), held
    # Loops are a second query axis here: the shared cache is read once for all of them.
    everything = attend(q_BNRH, held.keys[0], held.values[0], mask_B1S, part.axes)
    if loop.later_attention == "shared" or not later:
        return everything, held
    first, rings = later[0], slice(loops[later[0]] - 1, loops[-1])
    window = held.ring_keys.shape[3]

    def in_ring(ring_BRKWH: jax.Array, new_BKRH: jax.Array) -> jax.Array:
        new_BRK1H = new_BKRH[:, :, first:].swapaxes(1, 2)[:, :, :, None]
        return write_rings(ring_BRKWH, new_BRK1H, slots_B1 % window, rings.start)

    held = held._replace(
        ring_keys=in_ring(held.ring_keys, k_BKRH), ring_values=in_ring(held.ring_values, v_BKRH)
    )
    ring_mask_B1W = (ring_positions(lengths_B + 1, window) >= 0)[:, None]
    seen = (held.ring_keys[:, rings], held.ring_values[:, rings])
    local = attend_own(q_BNRH[:, :, first:], *seen, ring_mask_B1W)
    blended = blend(gate_BNR[:, :, first:], everything[:, :, first:], local)
    return jnp.concatenate([everything[:, :, :first], blended], axis=2), held
