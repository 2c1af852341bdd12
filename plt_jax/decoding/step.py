"""The decode step: one token of every sequence, all loops in ONE pass of the stack.

With the shift, loop l at position i needs only the previous loop's output at position i - 1, which
the step before has left in the cache (Algorithm 1 of the PLT paper). So the rows
a·E[i] + b·H^(l-1)[i-1] of all loops go through the layers together: the step reads each weight once
for all loops, and loop 1's keys and values too, because the loops are further queries at the same
position. Layers that do not loop have one row.
"""

from __future__ import annotations

import warnings
from functools import partial

import jax
import jax.numpy as jnp

from plt_jax.config import LoopConfig, ModelConfig
from plt_jax.config.model import Part
from plt_jax.decoding.attention import attend, attend_gated, shard_map_attention
from plt_jax.decoding.cache import Cache, LayerCache, Slots, Stored, shard_cache, write
from plt_jax.decoding.checks import check_step
from plt_jax.decoding.early_exit import ExitRule, RunCore, run_until_exit
from plt_jax.decoding.fused_attention import FUSED_OPS, attend_rows_fused, decode_kernel
from plt_jax.decoding.ops import DECODE_OPS, embed_tokens, head_logits, hidden_scale_of, norms_of
from plt_jax.decoding.placement import CacheShard
from plt_jax.decoding.weights import DecodeWeights, Params, prepare_for_decode, shard_rows
from plt_jax.model.block import apply_block
from plt_jax.model.layers import rope_rotation
from plt_jax.model.looping import Norm, loop_output, next_loop_input, rows_of_loops
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
    return step_logits(config, prepare_for_decode(config, params), tokens, cache)


def step_logits(
    config: ModelConfig,
    weights: DecodeWeights,
    tokens: jax.Array,
    cache: Cache,
    loops_B: jax.Array | None = None,
    longest: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Does what `decode_step` does, without its checks, for callers that are jitted themselves.

    Args:
      loops_B: int32, the number of loops after which each sequence's logits are taken, 1 to L;
        default L for all. The cache has all loops in any case.
      longest: positions of the longest sequence behind the step, at least. The slots of later
        positions are not read, so logits of sequences that are longer are wrong. Default: the
        cache's capacity.
    """
    E_B1D = embed_tokens(weights, tokens[:, None], config.dtype)
    norms = norms_of(config, weights)
    positions = cache.capacity if longest is None else min(longest, cache.capacity)
    run_rows = partial(_run_rows, config, weights, positions)
    first_B1D, cache = run_rows("prelude", range(1), E_B1D, cache)
    run_loops = _run_loops_in_turn
    if config.loop.shifted or config.loop.count == 1:
        run_loops = partial(_run_loops_together, hidden_scale_of(config, weights))
    run_core = partial(run_rows, "core")
    hidden_BLD, cache = run_loops(config.loop, run_core, norms.between_loops, first_B1D, cache)

    def last(rows_BLD: jax.Array) -> jax.Array:
        return rows_BLD[:, -1:] if loops_B is None else rows_of_loops(loops_B, rows_BLD)

    if config.has_coda:
        coda_B1D, cache = run_rows("coda", range(1), last(hidden_BLD), cache)
        read_B1D = norms.final(coda_B1D)
    else:
        # Normed together with the outputs that are carried, in one kernel.
        read_B1D = last(norms.final(hidden_BLD))
    cache = shard_cache(cache.replace(lengths=cache.lengths + 1))
    return head_logits(weights, read_B1D)[:, 0], cache


def step_until_exit(
    config: ModelConfig,
    weights: DecodeWeights,
    rule: ExitRule,
    tokens: jax.Array,
    cache: Cache,
    running_B: jax.Array,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Does what `step_logits` does, but stops the loops where the rule says so; see early_exit.py.

    Args:
      running_B: bool, the sequences that matter; no loop runs for the others alone.

    Returns:
      Logits, the cache, and the number of loops that each sequence has run, int32 [B].
    """
    E_B1D = embed_tokens(weights, tokens[:, None], config.dtype)
    norms = norms_of(config, weights)
    run_rows = partial(_run_rows, config, weights, cache.capacity)
    first_B1D, cache = run_rows("prelude", range(1), E_B1D, cache)
    run_core = partial(run_rows, "core")
    last_B1D, logits_BV, loops_B, cache = run_until_exit(
        config, weights, rule, norms, run_core, first_B1D, cache, running_B
    )
    if logits_BV is None:
        coda_B1D, cache = run_rows("coda", range(1), last_B1D, cache)
        logits_BV = head_logits(weights, norms.final(coda_B1D))[:, 0]
    return logits_BV, cache.replace(lengths=cache.lengths + 1), loops_B


def _run_loops_together(
    hidden_scale: float | jax.Array,
    loop: LoopConfig,
    run_core: RunCore,
    normalize: Norm,
    first_B1D: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """All loops in one pass: their hidden states [B, L, D], and the cache after it."""
    x_BLD = first_B1D
    if loop.count > 1:
        # The cache holds the outputs of the position before: they are shifted already.
        previous = cache.carried.astype(first_B1D.dtype)
        later_BLD = next_loop_input(loop, first_B1D, previous, lambda output: output, hidden_scale)
        x_BLD = jnp.concatenate([first_B1D, later_BLD], axis=1)
    hidden_BLD, cache = run_core(range(loop.count), x_BLD, cache)
    if not cache.carried.shape[1]:
        return hidden_BLD, cache
    carried_BLD = loop_output(loop, hidden_BLD, normalize)[:, :-1].astype(cache.carried.dtype)
    return hidden_BLD, cache.replace(carried=carried_BLD)


def _run_loops_in_turn(
    loop: LoopConfig, run_core: RunCore, normalize: Norm, first_B1D: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One pass for each loop: their hidden states [B, L, D], and the cache after them."""
    x_B1D, hidden = first_B1D, []
    for index in range(loop.count):
        hidden_B1D, cache = run_core(range(index, index + 1), x_B1D, cache)
        hidden.append(hidden_B1D)
        x_B1D = loop_output(loop, hidden_B1D, normalize)
    return jnp.concatenate(hidden, axis=1), cache


def _run_rows(
    config: ModelConfig,
    weights: DecodeWeights,
    positions: int,
    part: Part,
    loops: range,
    x_BRD: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """The layers of a part over one row for each loop of `loops`: hidden states [B, R, D], and the
    cache.

    Args:
      positions: the number of positions whose slots are read.
    """
    rotation = rope_rotation(config, cache.lengths[:, None])
    part_config, slots = config.of_part(part), cache.slots_in(part)
    if decode_kernel(config, cache) == "mosaic":
        ops, attend_rows = FUSED_OPS, partial(attend_rows_fused, part_config, slots)
    else:
        attend_rows = partial(_attend_rows, part_config, loops, slots, positions)
        ops, attend_rows = DECODE_OPS, partial(shard_map_attention, attend_rows)
    layers = cache.layers()
    for j in config.layers_in(part):
        x_BRD, layers[j], _ = apply_block(
            part_config,
            weights_of_loop(weights.layers[j], jnp.arange(loops.start, loops.stop)),
            shard_rows(x_BRD),
            rotation,
            partial(attend_rows, cache=layers[j], lengths_B=cache.lengths),
            ops,
        )
    return x_BRD, cache.with_layers(layers)


def _attend_rows(
    config: ModelConfig,
    loops: range,
    slots: Slots,
    positions: int,
    q_BNRH: jax.Array,
    k_BKRH: jax.Array,
    v_BKRH: jax.Array,
    gate_BNR: jax.Array | None,
    cache: LayerCache,
    lengths_B: jax.Array,
    shard: CacheShard,
) -> tuple[jax.Array, LayerCache]:
    """Attention of one row for each loop, in one layer; see `shard_map_attention`.

    All rows of a sequence are at the position behind its `lengths`. Where the cache is full, they
    are at the last position instead: checks refuse that outside of jit, and inside the sequence's
    logits are wrong.

    Args:
      positions: the number of positions whose slots are read, if this device holds all slots.
    """
    own = config.loop.later_attention == "own"
    held = cache.keys[0].shape[2]
    position_B = jnp.minimum(lengths_B, slots.capacity - 1)
    slot_S = shard.start + jnp.arange(held)
    shared_B1S = slot_S <= position_B[:, None, None]
    if shard.axes:
        positions = slots.capacity

    def attend_shared(keys: Stored, values: Stored, q_BNRH: jax.Array) -> jax.Array:
        mask_B1S = shared_B1S
        if positions < slots.capacity:
            mask_B1S = mask_B1S[..., :positions]
            keys, values = jax.tree.map(lambda array: array[:, :, :positions], (keys, values))
        return attend(q_BNRH, keys, values, mask_B1S, shard.axes)

    def written(stored: Stored, new_BKRH: jax.Array, rows: list[int]) -> Stored:
        """The array with the new keys or values of some rows."""
        if not rows:
            return stored
        slots_BR = jnp.stack([slots.of(0 if own else loops[row], position_B) for row in rows], 1)
        new_BKRH = new_BKRH[:, :, rows[0] : rows[-1] + 1]
        return write(stored, new_BKRH, shard.here(slots_BR, held), all_exist=not shard.axes)

    if own:
        keys, values, outs = list(cache.keys), list(cache.values), []
        for row, index in enumerate(loops):
            keys[index] = written(keys[index], k_BKRH, [row])
            values[index] = written(values[index], v_BKRH, [row])
            q_BN1H = q_BNRH[:, :, row : row + 1]
            outs.append(attend_shared(keys[index], values[index], q_BN1H))
        return jnp.concatenate(outs, axis=2), LayerCache(tuple(keys), tuple(values))
    # Loops are further queries here: every slot is read once for all of them.
    rows = [row for row, index in enumerate(loops) if index == 0 or slots.window]
    (keys,), (values,) = cache
    keys, values = written(keys, k_BKRH, rows), written(values, v_BKRH, rows)
    cache = LayerCache((keys,), (values,))
    if not slots.window or loops[-1] == 0:
        return attend_shared(keys, values, q_BNRH), cache
    assert gate_BNR is not None  # schemes with windows have gates
    masks = (shared_B1S, slots.seen(loops, position_B, slot_S))
    gate_BNR = jnp.where(jnp.array(loops) > 0, gate_BNR, 1.0)
    attended = attend_gated(
        q_BNRH, keys, values, masks, gate_BNR, positions, slots.capacity, shard.axes
    )
    return attended, cache
