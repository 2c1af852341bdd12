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

from plt_jax.decoding.cache import LayerCache, Quantized, Stored
from plt_jax.decoding.linear import on_two_rows
from plt_jax.decoding.placement import CacheShard, placement
from plt_jax.distributed.axes import mesh_is_active
from plt_jax.model.blockwise import MASKED, Partial, windowed_attention
from plt_jax.model.kernels import Backend, cudnn_masked_attention

QUERY_BLOCK, KEY_BLOCK = 256, 512
"""Block sizes of a chunk's attention: its logits take QUERY_BLOCK x KEY_BLOCK per head."""

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
    B, K, S, _ = cache.keys[0].shape
    where = placement(B, K, S)

    def attend_shard(q, k, v, gate, cache, *others):
        shard = CacheShard()
        if where.positions:
            start = jax.lax.axis_index(where.positions) * cache.keys[0].shape[2]
            shard = CacheShard(start, where.positions)
        return attend(q, k, v, gate, cache, *others, shard=shard)

    layer = LayerCache._make((where.full, where.full, where.ring, where.ring))
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
    B, N, T, H = q_BNTH.shape
    K, S = keys.shape[1:3]
    q_BKMH = q_BNTH.reshape(B, K, -1, H)
    logits_BKMS = _few_rows(q_BKMH, keys, "BKMH,BKSH->BKMS") / math.sqrt(H)
    if isinstance(keys, Quantized):
        logits_BKMS *= keys.scales.swapaxes(2, 3)
    # All heads share the mask, so it is applied where positions are an axis of their own.
    logits_BKGTS = logits_BKMS.reshape(B, K, N // K, T, S)
    logits_BKMS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED).reshape(B, K, -1, S)
    largest = jnp.max(logits_BKMS, axis=-1, keepdims=True)
    weights_BKMS = jnp.exp(logits_BKMS - largest)
    total = jnp.sum(weights_BKMS, axis=-1, keepdims=True)
    if isinstance(values, Quantized):
        weights_BKMS *= values.scales.swapaxes(2, 3)
    sum_BKMH = _few_rows(weights_BKMS.astype(q_BNTH.dtype), values, "BKMS,BKSH->BKMH")
    return Partial(sum_BKMH, total, largest)


def _few_rows(x_BKMx: jax.Array, stored: Stored, formula: str) -> jax.Array:
    """A product with stored keys or values, without their scales; summed in float32."""
    values = stored.values if isinstance(stored, Quantized) else stored
    values = values.astype(x_BKMx.dtype)

    def product(x: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, values, preferred_element_type=jnp.float32)

    def on_cpu(x: jax.Array) -> jax.Array:
        return on_two_rows(product, x, axis=2) if x.dtype == jnp.bfloat16 else product(x)

    return jax.lax.platform_dependent(x_BKMx, cpu=on_cpu, default=product)


def attend(
    q_BNTH: jax.Array,
    keys: Stored,
    values: Stored,
    mask_BTS: jax.Array,
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """Attention of a few queries to all keys that a mask allows, [B, N, T, H].

    Args:
      axes: the mesh axes along which the keys are split over devices.
    """
    return _over_devices(cache_attention(q_BNTH, keys, values, mask_BTS), axes).heads(q_BNTH)


def _over_devices(partial_attention: Partial, axes: tuple[str, ...]) -> Partial:
    return partial_attention.merge_over(axes) if axes else partial_attention


def attend_own(
    q_BNRH: jax.Array, keys_BRKSH: jax.Array, values_BRKSH: jax.Array, mask_B1S: jax.Array
) -> jax.Array:
    """Attention of each of R rows to keys of its own; all rows of a sequence share the mask."""
    B, N, R, H = q_BNRH.shape
    q = q_BNRH.swapaxes(1, 2).reshape(B * R, N, 1, H)
    keys, values = (x.reshape(B * R, *x.shape[2:]) for x in (keys_BRKSH, values_BRKSH))
    out = attend(q, keys, values, jnp.repeat(mask_B1S, R, axis=0))
    return out.reshape(B, R, N, H).swapaxes(1, 2)


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
    return _over_devices(done, shard.axes).heads(q_BNCH)


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
    rings: tuple[jax.Array, jax.Array],
    lengths_B: jax.Array,
) -> jax.Array:
    """Attention of a chunk's queries to the last W keys, in the ring and in the chunk itself.

    Args:
      new: the chunk's keys and values [B, K, C, H].
      rings: keys and values [B, K, W, H] of one loop, as they are before the chunk.
      lengths_B: number of tokens before the chunk.

    Returns:
      [B, N, C, H]; work and memory grow as C·W.
    """
    window, chunk = rings[0].shape[2], q_BNCH.shape[2]
    before = lengths_B[:, None] - window + jnp.arange(window)
    slots_B1W1 = (before % window)[:, None, :, None]
    keys, values = (
        jnp.concatenate([jnp.take_along_axis(ring, slots_B1W1, axis=2).astype(x.dtype), x], axis=2)
        for ring, x in zip(rings, new, strict=True)
    )
    # Empty slots get the number of another document, so that no query sees them. The positions of
    # the ring get queries too, whose outputs are dropped.
    documents = jnp.concatenate([before >= 0, jnp.ones((len(before), chunk), bool)], axis=1)
    q = jnp.pad(q_BNCH, ((0, 0), (0, 0), (window, 0), (0, 0)))
    out = windowed_attention(q, keys, values, documents.astype(jnp.int32), window)
    return out[:, :, window:]
