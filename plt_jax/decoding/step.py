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
from plt_jax.decoding.cache import Cache, Params, prepare_for_decode, ring_positions, write
from plt_jax.decoding.prefill import check_batch, prefill
from plt_jax.model.attention import blend, masked_attention
from plt_jax.model.block import apply_block
from plt_jax.model.layers import embed, logits_from, rms_norm, rope_rotation
from plt_jax.model.looping import loop_input


@partial(jax.jit, static_argnums=0)
def decode_step(
    config: ModelConfig, params: Params, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Appends one token to every sequence.

    Schemes without a shift cannot run their loops together and take one pass per loop.

    Args:
      params: as `prepare_for_decode` lays them out (fast), or as `Transformer.init` gives them.
      tokens: int32 [B].
      cache: unchanged; wrap the call in a jit that donates it to update it in place. A sequence
        that is already at capacity must not be continued: its token is lost.

    Returns:
      Logits of the next token, float32 [B, V], and the cache after this one.

    Raises:
      ValueError: batch sizes disagree.
    """
    check_batch(tokens, cache)
    loop = config.loop
    if loop.count > 1 and not loop.shifted:
        return prefill(config, params, tokens[:, None], jnp.ones_like(tokens), cache)
    params = prepare_for_decode(config, params)
    E_B1D = embed(tokens[:, None], params["embedding"], jnp.dtype(config.dtype))
    later_BLD = loop_input(loop, E_B1D, cache.carried.astype(E_B1D.dtype))
    x_BLD = jnp.concatenate([E_B1D, later_BLD], axis=1) if loop.count > 1 else E_B1D
    x_BLD, cache = _run_rows(config, params, x_BLD, cache)

    normed_BLD = rms_norm(x_BLD, params["final_norm"], config.norm_epsilon)
    handed_BLD = normed_BLD if loop.normalize_between_loops else x_BLD
    logits_B1V = logits_from(normed_BLD[:, -1:], params["embedding"], params.get("head"))
    cache = cache.replace(
        lengths=cache.lengths + 1,
        carried=handed_BLD[:, : cache.carried.shape[1]].astype(cache.carried.dtype),
    )
    return logits_B1V[:, 0], cache


def _run_rows(
    config: ModelConfig, params: Params, x_BLD: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """All layers over the rows of all loops: raw outputs [B, L, D], and the cache after them."""
    loop = config.loop
    slots_B1 = cache.lengths[:, None]
    ring_slots_B1 = slots_B1 % loop.window
    rotation = rope_rotation(config, slots_B1)
    mask_B1S = jnp.arange(cache.capacity) <= slots_B1[:, :, None]
    ring_mask_B1W = (ring_positions(cache.lengths + 1, loop.window) >= 0)[:, None]
    keys, values = list(cache.keys), list(cache.values)
    ring_keys, ring_values = list(cache.ring_keys), list(cache.ring_values)

    for layer, weights in enumerate(params["layers"]):

        def attend(q, k, v, gate_BNL, layer=layer):
            cached_rows = keys[layer].shape[1]
            for cached, new in ((keys, k), (values, v)):
                cached[layer] = write(cached[layer], rows_of(new)[:, :cached_rows], slots_B1)
            if cached_rows > 1:
                return _own_attention(q, keys[layer], values[layer], mask_B1S)
            # Loops are a second query axis here: the shared cache is read once for all of them.
            everything = masked_attention(
                q, keys[layer][:, 0].astype(q.dtype), values[layer][:, 0].astype(q.dtype), mask_B1S
            )
            if not ring_keys:
                return everything
            for ring, new in ((ring_keys, k), (ring_values, v)):
                ring[layer] = write(ring[layer], rows_of(new)[:, 1:], ring_slots_B1)
            local = _own_attention(q[:, :, 1:], ring_keys[layer], ring_values[layer], ring_mask_B1W)
            later = blend(gate_BNL[:, :, 1:], everything[:, :, 1:], local)
            return jnp.concatenate([everything[:, :, :1], later], axis=2)

        x_BLD, _ = apply_block(config, weights, x_BLD, rotation, attend)
    return x_BLD, cache.replace(
        keys=tuple(keys),
        values=tuple(values),
        ring_keys=tuple(ring_keys),
        ring_values=tuple(ring_values),
    )


def rows_of(x_BKLH: jax.Array) -> jax.Array:
    """Keys or values of all loops at one position, in the caches' layout [B, L, K, 1, H]."""
    return x_BKLH.swapaxes(1, 2)[:, :, :, None]


def _own_attention(
    q_BNRH: jax.Array, keys_BRKSH: jax.Array, values_BRKSH: jax.Array, mask_B1S: jax.Array
) -> jax.Array:
    """Each of R rows attends to its own keys; all rows of a sequence share the mask."""

    def one_row(q_BNH, k_BKSH, v_BKSH):
        dtype = q_BNH.dtype
        q_BN1H = q_BNH[:, :, None]
        out = masked_attention(q_BN1H, k_BKSH.astype(dtype), v_BKSH.astype(dtype), mask_B1S)
        return out[:, :, 0]

    return jax.vmap(one_row, in_axes=(2, 1, 1), out_axes=2)(q_BNRH, keys_BRKSH, values_BRKSH)
