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
from plt_jax.decoding.attention import attend, attend_own
from plt_jax.decoding.cache import Cache, closed, opened, ring_positions, write, write_rings
from plt_jax.decoding.checks import check_step
from plt_jax.decoding.layout import PREPARED_LAYOUT, Params, logits_of, prepare_for_decode
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
    return logits_of(params, last_B1D)[:, 0], cache.replace(lengths=cache.lengths + 1)


def _run_rows(
    config: ModelConfig, params: Params, loops: range, x_BRD: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """All layers over one row per loop of `loops`: raw outputs [B, R, D], and the cache after."""
    loop = config.loop
    slots_B1 = cache.lengths[:, None]
    mask_B1S = jnp.arange(cache.capacity) <= slots_B1[:, :, None]
    ring_mask_B1W = (ring_positions(cache.lengths + 1, loop.window) >= 0)[:, None]
    held = opened(cache)
    later = [row for row, index in enumerate(loops) if index > 0]
    rings = slice(loops[later[0]] - 1, loops[-1]) if later else slice(0)

    def write_row(stored: list, index: int, new_BKRH: jax.Array, row: int) -> None:
        stored[index] = write(stored[index], new_BKRH[:, :, row : row + 1], slots_B1)

    def attend_rows(layer: int, q, k, v, gate_BNR):
        keys, values = held.keys[layer], held.values[layer]
        if loop.later_attention == "own":
            outs = []
            for row, index in enumerate(loops):
                write_row(keys, index, k, row)
                write_row(values, index, v, row)
                outs.append(attend(q[:, :, row : row + 1], keys[index], values[index], mask_B1S))
            return jnp.concatenate(outs, axis=2)
        if loops[0] == 0:
            write_row(keys, 0, k, 0)
            write_row(values, 0, v, 0)
        # Loops are a second query axis here: the shared cache is read once for all of them.
        everything = attend(q, keys[0], values[0], mask_B1S)
        if loop.later_attention == "shared" or not later:
            return everything
        first = later[0]
        for ring, new in ((held.ring_keys, k), (held.ring_values, v)):
            new_BRK1H = new[:, :, first:].swapaxes(1, 2)[:, :, :, None]
            ring[layer] = write_rings(ring[layer], new_BRK1H, slots_B1 % loop.window, rings.start)
        seen = (ring[layer][:, rings] for ring in (held.ring_keys, held.ring_values))
        local = attend_own(q[:, :, first:], *seen, ring_mask_B1W)
        blended = blend(gate_BNR[:, :, first:], everything[:, :, first:], local)
        return jnp.concatenate([everything[:, :, :first], blended], axis=2)

    rotation = rope_rotation(config, slots_B1)
    for layer, declared in enumerate(params["layers"]):
        weights = of_loops(declared, jnp.arange(loops.start, loops.stop))
        x_BRD, _ = apply_block(
            config, weights, x_BRD, rotation, partial(attend_rows, layer), PREPARED_LAYOUT
        )
    return x_BRD, closed(held)
