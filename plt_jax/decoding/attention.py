"""Attention of new tokens to a cache: in one product for a few queries, in blocks for a chunk.

The queries of all heads, positions and loops that read one key/value head form one axis,
M = (N / K)·T queries per key/value head. So the cache is read once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.decoding.cache import LayerCache, Stored
from plt_jax.decoding.linear import on_two_rows
from plt_jax.decoding.placement import CacheShard, placement
from plt_jax.decoding.quantization import Quantized
from plt_jax.distributed.axes import mesh_is_active
from plt_jax.model.attention import blend
from plt_jax.model.blockwise import MASKED, Partial, windowed_attention
from plt_jax.model.kernels import Backend, cudnn_masked_attention, traced_platform

QUERY_BLOCK, KEY_BLOCK = 256, 512
"""Block sizes of a chunk's attention: its logits take QUERY_BLOCK x KEY_BLOCK per head."""

LONG_CACHE = 4096
"""Shared slots from which on a CPU attends to windows in products of their own. XLA makes copies of
parts of the logits there, which then take longer than small products."""

Attend = Callable[..., tuple[jax.Array, LayerCache]]
"""`attend(q_BNTH, k_BKTH, v_BKTH, gate_BNT, cache, lengths_B, *more, shard)`: the heads' outputs
[B, N, T, H], and the layer's cache with the new keys and values."""


def shard_map_attention(
    attend: Attend,
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    gate_BNT: jax.Array | None,
    cache: LayerCache,
    lengths_B: jax.Array,
    more: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, LayerCache]:
    """Runs `attend` on each device, with the sequences, heads and positions that it holds.

    Args:
      more: further arrays for `attend`, with a leading axis of B.
    """
    inputs = (q_BNTH, k_BKTH, v_BKTH, gate_BNT, cache, lengths_B, *more)
    if not mesh_is_active():
        return attend(*inputs, shard=CacheShard())
    where = placement(*cache.keys[0].shape[:3])

    def attend_shard(q, k, v, gate, cache, *others):
        shard = CacheShard()
        if where.slots:
            start = jax.lax.axis_index(where.slots) * cache.keys[0].shape[2]
            shard = CacheShard(start, where.slots)
        return attend(q, k, v, gate, cache, *others, shard=shard)

    layer = LayerCache._make((where.stored, where.stored))
    batch = PartitionSpec(where.batch)
    return jax.shard_map(
        attend_shard,
        in_specs=(*[where.rows] * 4, layer, *[batch] * (1 + len(more))),
        out_specs=(where.rows, layer),
        check_vma=False,  # the sums over positions leave equal copies, which it cannot know
    )(*inputs)


def cache_attention(
    q_BNTH: jax.Array, keys: Stored, values: Stored, mask_BTS: jax.Array
) -> Partial:
    """Softmax attention, in float32, of queries to the keys that a mask allows, [B, K, M, H].

    It differs from `model.blockwise.partial_attention` in two points: keys and values may be
    quantized, and its products are those for a few rows.

    Args:
      mask_BTS: bool, broadcastable to [B, T, S]; every query needs one allowed key.
    """
    logits_BKGTS = _logits(q_BNTH, keys)
    # All heads share the mask, so it is applied where positions are an axis of their own.
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
    logits_BKMS = logits_BKGTS.reshape(*keys.shape[:2], -1, keys.shape[2])
    largest = jnp.max(logits_BKMS, axis=-1, keepdims=True)
    weights_BKMS = jnp.exp(logits_BKMS - largest)
    total = jnp.sum(weights_BKMS, axis=-1, keepdims=True)
    return Partial(_weighted_sum(weights_BKMS, values, q_BNTH.dtype), total, largest)


def attend(
    q_BNRH: jax.Array,
    keys: Stored,
    values: Stored,
    mask_BRS: jax.Array,
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """Attention of a few queries to all slots that a mask allows, [B, N, R, H].

    Args:
      mask_BRS: bool [B, 1 or R, S]; every query needs one allowed slot.
      axes: the mesh axes along which the slots are split over devices.
    """
    weights_BKGRS = _softmax(_logits(q_BNRH, keys), mask_BRS, axes)
    return _sum_of_values(weights_BKGRS, values, q_BNRH, axes)


def attend_gated(
    q_BNRH: jax.Array,
    keys: Stored,
    values: Stored,
    masks: tuple[jax.Array, jax.Array],
    gate_BNR: jax.Array,
    positions: int,
    windows_at: int,
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """G-SWA of one row for each loop, in as many products as `attend`, [B, N, R, H].

    Each row has two softmaxes: over the shared slots, whose weights are multiplied with the gate,
    and over the slots of its window, whose weights are multiplied with the rest.

    Args:
      masks: the shared slots and the slots of its window that a row sees, as in `attend`. A row
        without a window need not see any.
      gate_BNR: the weight of the shared slots, float32; 1 for rows without a window.
      positions: the number of shared slots that are read, from the first on.
      windows_at: the number of the first slot that is not shared.
    """
    on_cpu = traced_platform() == "cpu" and not axes
    if positions < windows_at or (on_cpu and windows_at >= LONG_CACHE):

        def over(part: slice, mask: jax.Array) -> jax.Array:
            k, v = jax.tree.map(lambda array: array[:, :, part], (keys, values))
            return cache_attention(q_BNRH, k, v, mask[..., part]).heads(q_BNRH)

        shared, window = over(slice(positions), masks[0]), over(slice(windows_at, None), masks[1])
        return blend(gate_BNR, shared, window)
    logits_BKGRS = _logits(q_BNRH, keys)
    g = gate_BNR.reshape(*logits_BKGRS.shape[:4], 1)
    # Where a row has no window, the weights of all its slots are equal, and times zero.
    if on_cpu:  # which would feel the second softmax over all slots
        shared_BKGRS = _softmax(logits_BKGRS[..., :windows_at], masks[0][..., :windows_at])
        window_BKGRS = _softmax(logits_BKGRS[..., windows_at:], masks[1][..., windows_at:])
        weights_BKGRS = jnp.concatenate([g * shared_BKGRS, (1.0 - g) * window_BKGRS], axis=-1)
    else:
        # A device may hold any of the slots, and a GPU has one kernel for two softmaxes of a width.
        shared_BKGRS, window_BKGRS = (_softmax(logits_BKGRS, mask, axes) for mask in masks)
        weights_BKGRS = g * shared_BKGRS + (1.0 - g) * window_BKGRS
    return _sum_of_values(weights_BKGRS, values, q_BNRH, axes)


def _softmax(logits_BKGRS: jax.Array, mask_BRS: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """The weights of the slots that a mask allows, on all devices along mesh axes together."""
    logits_BKGRS = jnp.where(mask_BRS[:, None, None], logits_BKGRS, MASKED)
    largest = jnp.max(logits_BKGRS, axis=-1, keepdims=True)
    powers_BKGRS = jnp.exp(logits_BKGRS - (jax.lax.pmax(largest, axes) if axes else largest))
    total = jnp.sum(powers_BKGRS, axis=-1, keepdims=True)
    return powers_BKGRS / (jax.lax.psum(total, axes) if axes else total)


def _logits(q_BNTH: jax.Array, keys: Stored) -> jax.Array:
    """The scaled products of queries and keys, float32 [B, K, G, T, S]."""
    B, N, T, H = q_BNTH.shape
    K, S = keys.shape[1:3]
    logits_BKMS = _few_rows(q_BNTH.reshape(B, K, -1, H), keys, "BKMH,BKSH->BKMS") / math.sqrt(H)
    if isinstance(keys, Quantized):
        logits_BKMS *= keys.scales.swapaxes(2, 3)
    return logits_BKMS.reshape(B, K, N // K, T, S)


def _weighted_sum(weights_BKMS: jax.Array, values: Stored, dtype: jnp.dtype) -> jax.Array:
    """The sums of values by weights, float32 [B, K, M, H]; the products are of `dtype`."""
    if isinstance(values, Quantized):
        weights_BKMS *= values.scales.swapaxes(2, 3)
    return _few_rows(weights_BKMS.astype(dtype), values, "BKMS,BKSH->BKMH")


def _sum_of_values(
    weights_BKGRS: jax.Array, values: Stored, q_BNRH: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
    """The weighted sums of the values on all devices, in the shape and dtype of the queries."""
    B, K, _, _, S = weights_BKGRS.shape
    out_BKMH = _weighted_sum(weights_BKGRS.reshape(B, K, -1, S), values, q_BNRH.dtype)
    if axes:
        out_BKMH = jax.lax.psum(out_BKMH, axes)
    return out_BKMH.astype(q_BNRH.dtype).reshape(q_BNRH.shape)


def _few_rows(x_BKMx: jax.Array, stored: Stored, formula: str) -> jax.Array:
    """A product with stored keys or values, without their scales; summed in float32."""
    values = stored.values if isinstance(stored, Quantized) else stored
    values = values.astype(x_BKMx.dtype)

    def product(x: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, values, preferred_element_type=jnp.float32)

    def on_cpu(x: jax.Array) -> jax.Array:
        return on_two_rows(product, x, axis=2) if x.dtype == jnp.bfloat16 else product(x)

    return jax.lax.platform_dependent(x_BKMx, cpu=on_cpu, default=product)


def attend_causally(
    q_BNCH: jax.Array,
    keys: Stored,
    values: Stored,
    positions_BC: jax.Array,
    backend: Backend = "xla",
    shard: CacheShard = CacheShard(),
) -> jax.Array:
    """Attention of a chunk's queries to the cached keys up to their positions, [B, N, C, H].

    Queries and keys are cut into blocks. Keys after the last position of a block of queries are not
    read. So work grows with the number of keys written, not with the cache's capacity, and memory
    grows with neither.

    Args:
      backend: "cudnn" gives each block of queries to cuDNN, with a mask over the whole capacity,
        unless the keys have another dtype than the queries or are split over devices. "splash"
        means "xla" here, since splash knows no offsets that differ between sequences.
      shard: the positions that this device holds.
    """
    attend_block = partial(_attend_block, shard=shard)
    alike = not isinstance(keys, Quantized) and keys.dtype == q_BNCH.dtype
    if backend == "cudnn" and alike and not shard.axes:
        attend_block = _attend_block_by_cudnn
    B, N, C, H = q_BNCH.shape
    block = min(QUERY_BLOCK, C)
    count = -(-C // block)
    if count == 1:
        return attend_block(q_BNCH, keys, values, positions_BC)
    padding = count * block - C
    q = jnp.pad(q_BNCH, ((0, 0), (0, 0), (0, padding), (0, 0))).reshape(B, N, count, block, H)
    positions = jnp.pad(positions_BC, ((0, 0), (0, padding))).reshape(B, count, block)

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        return attend_block(inputs[0], keys, values, inputs[1])

    out = jax.lax.map(one, (jnp.moveaxis(q, 2, 0), positions.swapaxes(0, 1)))
    return jnp.moveaxis(out, 0, 2).reshape(B, N, -1, H)[:, :, :C]


def _attend_block(
    q_BNCH: jax.Array, keys: Stored, values: Stored, positions_BC: jax.Array, shard: CacheShard
) -> jax.Array:
    """Attention of one block of queries, over blocks of keys."""
    positions_BC -= shard.start
    capacity = keys.shape[2]
    block = min(KEY_BLOCK, capacity)

    def over(index: jax.Array | int) -> Partial:
        # The last block ends with the cache, and masks the keys that the block before has seen.
        start = jnp.minimum(index * block, capacity - block)
        k, v = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, block, axis=2), (keys, values)
        )
        slots = start + jnp.arange(block)
        mask_BCS = (slots >= index * block) & (slots <= positions_BC[:, :, None])
        return cache_attention(q_BNCH, k, v, mask_BCS)

    # Block 0 holds a key for every query. Where another block holds none, its result is junk with
    # MASKED as largest logit, to which `merge` gives a weight of exactly zero.
    blocks = jnp.minimum(jnp.max(positions_BC) // block + 1, -(-capacity // block))
    done = jax.lax.fori_loop(1, blocks, lambda i, so_far: so_far.merge(over(i)), over(0))
    return (done.merge_over(shard.axes) if shard.axes else done).heads(q_BNCH)


def _attend_block_by_cudnn(
    q_BNCH: jax.Array, keys: Stored, values: Stored, positions_BC: jax.Array
) -> jax.Array:
    """Attention of one block of queries by cuDNN, with a mask over the whole capacity."""
    assert isinstance(keys, jax.Array) and isinstance(values, jax.Array)
    mask_BCS = jnp.arange(keys.shape[2]) <= positions_BC[:, :, None]
    return cudnn_masked_attention(q_BNCH, keys, values, mask_BCS)


def attend_window(
    q_BNCH: jax.Array,
    new: tuple[jax.Array, jax.Array],
    before: tuple[jax.Array, jax.Array],
    held_BW: jax.Array,
) -> jax.Array:
    """Attention of a chunk's queries to the last W keys, before the chunk and in the chunk itself.

    Args:
      new: the chunk's keys and values [B, K, C, H].
      before: the keys and values [B, K, W, H] of the W positions before the chunk, in order.
      held_BW: bool, which of those positions exist.

    Returns:
      [B, N, C, H]; work and memory grow as C·W.
    """
    window, chunk = before[0].shape[2], q_BNCH.shape[2]
    keys, values = (jnp.concatenate(both, axis=2) for both in zip(before, new, strict=True))
    if chunk <= window:
        # So few queries are multiplied with all keys: in blocks, positions before the chunk would
        # have queries, too.
        query_C1, key_S = window + jnp.arange(chunk)[:, None], jnp.arange(window + chunk)
        near_CS = (key_S <= query_C1) & (key_S > query_C1 - window)
        exists_BS = jnp.pad(held_BW, ((0, 0), (0, chunk)), constant_values=True)
        mask_BCS = near_CS & exists_BS[:, None]
        return cache_attention(q_BNCH, keys, values, mask_BCS).heads(q_BNCH)
    # Positions before the text get the number of another document, so that no query sees them.
    # All positions before the chunk get queries too, whose outputs are dropped.
    documents = jnp.concatenate([held_BW, jnp.ones((len(held_BW), chunk), bool)], axis=1)
    q = jnp.pad(q_BNCH, ((0, 0), (0, 0), (window, 0), (0, 0)))
    out = windowed_attention(q, keys, values, documents.astype(jnp.int32), window)
    return out[:, :, window:]
