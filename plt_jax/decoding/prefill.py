"""Prefill: the next chunk of every sequence, parallel over positions and serial over loops.

A chunk may start at any position, so a prompt can come in any split of chunks and decode steps.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.config.model import Part
from plt_jax.decoding.attention import attend_causally, attend_window, shard_map_attention
from plt_jax.decoding.cache import Cache, LayerCache, Slots, Stored, read, shard_cache, write
from plt_jax.decoding.checks import check_chunk
from plt_jax.decoding.ops import DECODE_OPS, embed_tokens, head_logits, hidden_scale_of, norms_of
from plt_jax.decoding.placement import CacheShard
from plt_jax.decoding.weights import DecodeWeights, Params, prepare_for_decode, shard_rows
from plt_jax.model.attention import blend, choose_backend
from plt_jax.model.block import apply_block
from plt_jax.model.kernels import Backend
from plt_jax.model.layers import Rotation, rope_rotation
from plt_jax.model.looping import loop_output, next_loop_input
from plt_jax.model.moe import weights_of_loop


def prefill(
    config: ModelConfig,
    params: Params | DecodeWeights,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Appends a chunk to every sequence.

    Args:
      params: as `Transformer.init` returns them, or as `prepare_for_decode` lays them out.
      tokens: int32 [B, C], padded on the right.
      lengths: int32 [B], the number of tokens of each row that are not padding, 0 to C.
      cache: is not changed. To update it in place, wrap the call in a jit that donates it.

    Returns:
      The logits of each sequence's last token of the chunk, float32 [B, V] (meaningless where the
      length is 0), and the cache after the chunk.

    Raises:
      InputError: shapes disagree; the chunk is longer than the cache; a token lies outside of the
        vocabulary; or the cache has no room for the tokens. The last two are checked only outside
        of jit, where values are known: inside, such tokens are lost or give wrong logits.
    """
    check_chunk(config, tokens, lengths, cache)
    return _prefill(config, params, tokens, lengths, cache)


@partial(jax.jit, static_argnums=0)
def _prefill(
    config: ModelConfig,
    params: Params | DecodeWeights,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    weights = prepare_for_decode(config, params)
    output_BCD, cache = prefill_outputs(config, weights, tokens, lengths, cache)
    last_B1D = last_of_chunk(output_BCD, lengths)
    return head_logits(weights, last_B1D)[:, 0], cache


def last_of_chunk(x_BCD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The states of each row's last token that is not padding, [B, 1, D]; of its first one where
    there is none."""
    last_B = jnp.maximum(lengths_B - 1, 0)
    return jnp.take_along_axis(x_BCD, last_B[:, None, None], axis=1)


def prefill_outputs(
    config: ModelConfig,
    weights: DecodeWeights,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    loops_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Does what `prefill` does, without its checks and the head, for callers that are jitted.

    Args:
      loops_B: see `step_logits`.

    Returns:
      What the head reads behind each token, [B, C, D] in the compute dtype, and the cache after the
      chunk.
    """
    loop = config.loop
    positions_BC = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    rotation = rope_rotation(config, positions_BC)
    embeddings_BCD = embed_tokens(weights, tokens, config.dtype)
    norms, run = norms_of(config, weights), partial(_run_layers, config, weights, lengths, rotation)
    first_BCD, cache = run("prelude", 0, embeddings_BCD, cache)
    x_BCD, carried = first_BCD, []
    hidden_BCD = read_BCD = first_BCD
    for index in range(loop.count):
        if index > 0:
            before_B1D = cache.carried[:, index - 1 : index].astype(first_BCD.dtype)
            shift = partial(_shift_chunk, before_B1D=before_B1D)
            output_BCD = loop_output(loop, hidden_BCD, norms.between_loops)
            if loop.shifted:
                carried.append(_last_or(output_BCD, lengths, before_B1D))
            scale = hidden_scale_of(config, weights)
            x_BCD = next_loop_input(loop, first_BCD, output_BCD, shift, scale)
        hidden_BCD, cache = run("core", index, x_BCD, cache)
        is_last_B = index == loop.count - 1 if loops_B is None else loops_B == index + 1
        read_BCD = jnp.where(jnp.reshape(is_last_B, (-1, 1, 1)), hidden_BCD, read_BCD)
    if carried:
        cache = cache.replace(carried=jnp.concatenate(carried, axis=1).astype(cache.carried.dtype))
    coda_BCD, cache = run("coda", 0, read_BCD, cache)
    cache = shard_cache(cache.replace(lengths=cache.lengths + lengths))
    return norms.final(coda_BCD), cache


def _shift_chunk(output_BCD: jax.Array, before_B1D: jax.Array) -> jax.Array:
    """Moves outputs one position to the right; `before` is the output ahead of the chunk."""
    return jnp.concatenate([before_B1D, output_BCD[:, :-1]], axis=1)


def _last_or(x_BCD: jax.Array, lengths_B: jax.Array, before_B1D: jax.Array) -> jax.Array:
    """The state at each row's last token, or `before` where the row has none, [B, 1, D]."""
    return jnp.where((lengths_B > 0)[:, None, None], last_of_chunk(x_BCD, lengths_B), before_B1D)


def _run_layers(
    config: ModelConfig,
    weights: DecodeWeights,
    lengths_B: jax.Array,
    rotation: Rotation,
    part: Part,
    index: int,
    x_BCD: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Runs the layers of a part over the chunk in one loop (0 for the first): the hidden states
    [B, C, D], and the cache with its keys and values."""
    part_config, slots = config.of_part(part), cache.slots_in(part)
    attend_chunk = partial(_attend_chunk, part_config, index, slots, choose_backend(config))
    layers = cache.layers()
    for j in config.layers_in(part):
        attend = partial(
            shard_map_attention,
            attend_chunk,
            cache=layers[j],
            lengths_B=cache.lengths,
            more=(lengths_B,),
        )
        x_BCD, layers[j], _ = apply_block(
            part_config,
            weights_of_loop(weights.layers[j], index),
            shard_rows(x_BCD),
            rotation,
            attend,
            DECODE_OPS,
        )
    return x_BCD, cache.with_layers(layers)


def _attend_chunk(
    config: ModelConfig,
    index: int,
    slots: Slots,
    backend: Backend,
    q_BNCH: jax.Array,
    k_BKCH: jax.Array,
    v_BKCH: jax.Array,
    gate_BNC: jax.Array | None,
    cache: LayerCache,
    before_B: jax.Array,
    lengths_B: jax.Array,
    shard: CacheShard,
) -> tuple[jax.Array, LayerCache]:
    """Attention of a chunk in loop `index` and one layer; see `shard_map_attention`."""
    loop = config.loop
    own = index == 0 or loop.later_attention == "own"
    row = index if own else 0
    held, C = cache.keys[0].shape[2], q_BNCH.shape[2]
    real_BC = jnp.arange(C) < lengths_B[:, None]
    positions_BC = before_B[:, None] + jnp.arange(C)
    seen_BC = jnp.where(real_BC, positions_BC, 0)  # padding need not look far

    def written(stored: Stored, new_BKCH: jax.Array, slots_BC: jax.Array) -> Stored:
        return write(stored, new_BKCH, shard.here(slots_BC, held))

    keys, values = list(cache.keys), list(cache.values)
    if own:
        slots_BC = jnp.where(real_BC, slots.of(0, positions_BC), slots.count)
        keys[row] = written(keys[row], k_BKCH, slots_BC)
        values[row] = written(values[row], v_BKCH, slots_BC)
    global_BNCH = attend_causally(q_BNCH, keys[row], values[row], seen_BC, backend, shard)
    if own or loop.later_attention == "shared":
        return global_BNCH, LayerCache(tuple(keys), tuple(values))
    past_BW = before_B[:, None] - slots.window + jnp.arange(slots.window)

    def past(stored: Stored) -> jax.Array:
        """This loop's keys or values of the W positions before the chunk."""
        slots_BW = shard.here(slots.of(index, past_BW), held)
        past_BKWH = read(stored, slots_BW, q_BNCH.dtype)
        return jax.lax.psum(past_BKWH, shard.axes) if shard.axes else past_BKWH

    before = past(keys[0]), past(values[0])
    local_BNCH = attend_window(q_BNCH, (k_BKCH, v_BKCH), before, past_BW >= 0)
    kept_BC = kept_in_window(slots.window, positions_BC, lengths_B, before_B)
    slots_BC = jnp.where(kept_BC, slots.of(index, positions_BC), slots.count)
    cache = LayerCache(
        (written(keys[0], k_BKCH, slots_BC),), (written(values[0], v_BKCH, slots_BC),)
    )
    assert gate_BNC is not None  # schemes with windows have gates
    return blend(gate_BNC, global_BNCH, local_BNCH), cache


def kept_in_window(
    window: int, positions_BC: jax.Array, lengths_B: jax.Array, before_B: jax.Array
) -> jax.Array:
    """Which keys of a chunk its window keeps, bool [B, C].

    Not kept are padding and the keys that later ones of the chunk would overwrite: which of two
    writes to one slot remains is undefined.
    """
    end_B1 = (before_B + lengths_B)[:, None]
    return (positions_BC < end_B1) & (positions_BC >= end_B1 - window)
