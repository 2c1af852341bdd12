"""The decode step: one token of every sequence, all loops in ONE pass of the stack.

With the shift, loop l at position i needs only the previous loop's output at position i - 1, which
the step before has left in the cache (Algorithm 1 of the PLT paper). So the rows
a·E[i] + b·H^(l-1)[i-1] of all loops go through the layers together: the step reads each weight once
for all loops, and loop 1's keys and values too, because the loops are further queries at the same
position.
"""

from __future__ import annotations

import warnings
from functools import partial

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.decoding.attention import attend, attend_own, shard_map_attention
from plt_jax.decoding.cache import (
    Cache,
    LayerCache,
    Stored,
    ring_positions,
    shard_cache,
    write,
    write_rings,
)
from plt_jax.decoding.checks import check_step
from plt_jax.decoding.ops import DECODE_OPS, head_logits
from plt_jax.decoding.placement import CacheShard
from plt_jax.decoding.weights import DecodeWeights, Params, prepare_for_decode, shard_rows
from plt_jax.model.attention import blend
from plt_jax.model.block import apply_block
from plt_jax.model.layers import embed, rms_norm, rope_rotation
from plt_jax.model.looping import Norm, loop_output, next_loop_input
from plt_jax.model.moe import weights_of_loop


class UnpreparedWeightsWarning(UserWarning):
    """`decode_step` was given parameters that it has to lay out anew at every call."""


def decode_step(
    config: ModelConfig, params: Params | DecodeWeights, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Appends one token to every sequence.

    Schemes without a shift cannot run their loops together; they take one pass for each loop.

    Args:
      params: as `prepare_for_decode` lays them out. Those that `Transformer.init` returns are laid
        out anew at every call, which costs more than the step; the first such call of a process
        warns with UnpreparedWeightsWarning.
      tokens: int32 [B].
      cache: is not changed. To update it in place, wrap the call in a jit that donates it.

    Returns:
      Logits of the next token, float32 [B, V], and the cache after this one.

    Raises:
      InputError: batch sizes disagree; a token lies outside of the vocabulary; or a sequence fills
        the cache already. The last two are checked only outside of jit, where values are known:
        inside, such tokens are lost or give wrong logits.
    """
    check_step(config, tokens, cache)
    if not isinstance(params, DecodeWeights):
        # Python's default filter shows it once for each line of code that calls.
        warnings.warn(
            "decode_step lays the parameters out anew at every call; call "
            "plt_jax.prepare_for_decode(config, params) once, and pass what it returns",
            UnpreparedWeightsWarning,
            stacklevel=2,
        )
    return _decode_step(config, params, tokens, cache)


@partial(jax.jit, static_argnums=0)
def _decode_step(
    config: ModelConfig, params: Params | DecodeWeights, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    weights = prepare_for_decode(config, params)
    normalize = partial(rms_norm, scale=weights.final_norm, epsilon=config.norm_epsilon)
    E_B1D = embed(tokens[:, None], weights.embedding, jnp.dtype(config.dtype))
    one_pass = config.loop.shifted or config.loop.count == 1
    run_loops = _run_loops_together if one_pass else _run_loops_in_turn
    output_B1D, cache = run_loops(config, weights, normalize, E_B1D, cache)
    cache = shard_cache(cache.replace(lengths=cache.lengths + 1))
    return head_logits(weights, output_B1D)[:, 0], cache


def _run_loops_together(
    config: ModelConfig, weights: DecodeWeights, normalize: Norm, E_B1D: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """All loops in one pass: the last loop's output [B, 1, D], and the cache after it."""
    loop, x_BLD = config.loop, E_B1D
    if loop.count > 1:
        # The cache holds the outputs of the position before: they are shifted already.
        previous = cache.carried.astype(E_B1D.dtype)
        later_BLD = next_loop_input(loop, E_B1D, previous, shift=lambda output: output)
        x_BLD = jnp.concatenate([E_B1D, later_BLD], axis=1)
    hidden_BLD, cache = _run_rows(config, weights, range(loop.count), x_BLD, cache)
    is_last_L1 = jnp.arange(loop.count)[:, None] == loop.count - 1
    output_BLD = loop_output(loop, hidden_BLD, normalize, is_last_L1)
    carried_BLD = output_BLD[:, : cache.carried.shape[1]].astype(cache.carried.dtype)
    return output_BLD[:, -1:], cache.replace(carried=carried_BLD)


def _run_loops_in_turn(
    config: ModelConfig, weights: DecodeWeights, normalize: Norm, E_B1D: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One pass for each loop: the last loop's output [B, 1, D], and the cache after it."""
    loop, output_B1D = config.loop, E_B1D
    for index in range(loop.count):
        hidden_B1D, cache = _run_rows(config, weights, range(index, index + 1), output_B1D, cache)
        output_B1D = loop_output(loop, hidden_B1D, normalize, is_last=index == loop.count - 1)
    return output_B1D, cache


def _run_rows(
    config: ModelConfig, weights: DecodeWeights, loops: range, x_BRD: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """All layers over one row for each loop of `loops`: hidden states [B, R, D], and the cache."""
    rotation = rope_rotation(config, cache.lengths[:, None])
    attend_rows = partial(_attend_rows, config, loops)
    layers = []
    for layer_weights, layer_cache in zip(weights.layers, cache.layers(), strict=True):
        attend_layer = partial(
            shard_map_attention, attend_rows, cache=layer_cache, lengths_B=cache.lengths
        )
        x_BRD, layer_cache, _ = apply_block(
            config,
            weights_of_loop(layer_weights, jnp.arange(loops.start, loops.stop)),
            shard_rows(x_BRD),
            rotation,
            attend_layer,
            DECODE_OPS,
        )
        layers.append(layer_cache)
    return x_BRD, cache.with_layers(layers)


def _attend_rows(
    config: ModelConfig,
    loops: range,
    q_BNRH: jax.Array,
    k_BKRH: jax.Array,
    v_BKRH: jax.Array,
    gate_BNR: jax.Array | None,
    cache: LayerCache,
    lengths_B: jax.Array,
    shard: CacheShard,
) -> tuple[jax.Array, LayerCache]:
    """Attention of one row for each loop, in one layer; see `shard_map_attention`.

    All rows of a sequence are at the position behind its `lengths`.
    """
    loop = config.loop
    capacity, slots_B1 = cache.keys[0].shape[2], lengths_B[:, None]
    own_B1 = shard.slots(slots_B1, capacity)
    mask_B1S = shard.start + jnp.arange(capacity) <= slots_B1[:, :, None]
    later = [row for row, index in enumerate(loops) if index > 0]

    def written(stored: tuple[Stored, ...], new_BKRH: jax.Array, rows: dict[int, int]):
        """The arrays of all loops, with the new rows of those in `rows`, by loop."""
        return tuple(
            write(old, new_BKRH[:, :, rows[index] : rows[index] + 1], own_B1)
            if index in rows
            else old
            for index, old in enumerate(stored)
        )

    own = loop.later_attention == "own"
    rows = {index: row for row, index in enumerate(loops) if own or index == 0}
    cache = cache._replace(
        keys=written(cache.keys, k_BKRH, rows), values=written(cache.values, v_BKRH, rows)
    )
    if own:
        outs = [
            attend(
                *(q_BNRH[:, :, row : row + 1], cache.keys[index], cache.values[index], mask_B1S),
                shard.axes,
            )
            for index, row in rows.items()
        ]
        return jnp.concatenate(outs, axis=2), cache
    # Loops are a second axis of queries here: the shared cache is read once for all of them.
    global_BNRH = attend(q_BNRH, cache.keys[0], cache.values[0], mask_B1S, shard.axes)
    if loop.later_attention == "shared" or not later:
        return global_BNRH, cache
    first, rings = later[0], slice(loops[later[0]] - 1, loops[-1])
    ring_keys, ring_values = cache.rings()
    window = ring_keys.shape[3]

    def in_ring(ring_BRKWH: jax.Array, new_BKRH: jax.Array) -> jax.Array:
        new_BRK1H = new_BKRH[:, :, first:].swapaxes(1, 2)[:, :, :, None]
        return write_rings(ring_BRKWH, new_BRK1H, slots_B1 % window, rings.start)

    ring_keys, ring_values = in_ring(ring_keys, k_BKRH), in_ring(ring_values, v_BKRH)
    cache = cache._replace(ring_keys=ring_keys, ring_values=ring_values)
    ring_mask_B1W = (ring_positions(lengths_B + 1, window) >= 0)[:, None]
    local_BNRH = attend_own(
        q_BNRH[:, :, first:], ring_keys[:, rings], ring_values[:, rings], ring_mask_B1W
    )
    assert gate_BNR is not None  # schemes with rings have gates
    blended = blend(gate_BNR[:, :, first:], global_BNRH[:, :, first:], local_BNRH)
    return jnp.concatenate([global_BNRH[:, :, :first], blended], axis=2), cache
