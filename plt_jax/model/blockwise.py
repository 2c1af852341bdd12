"""Attention over whole sequences in plain XLA, on any device, and how partial results merge.

Arrays are named as in attention.py. A block of queries is multiplied only with the blocks of keys
that it can see.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from plt_jax.model.kernels import ATTENTION

# Far below any logit, yet finite: a float32 softmax gives such keys a weight of exactly zero, and
# thus an exactly zero gradient, without the NaN that a row of infinities would give.
MASKED = -1e30
MIN_BLOCK = 64  # Smaller blocks of queries cost more in overhead than they save in products.
MAX_BLOCKS = 8  # Of causal attention; each is compiled by itself. 8 skip 7/16 of all products.


class Partial(NamedTuple):
    """Softmax attention over some of the keys, float32, [..., H] or [..., 1] for each query."""

    sum: jax.Array
    """The sum of values, weighted with exp(logit - largest)."""
    total: jax.Array
    """The sum of those weights."""
    largest: jax.Array
    """The largest logit."""

    def merge(self, other: Partial) -> Partial:
        """Attention over the keys of both."""
        largest = jnp.maximum(self.largest, other.largest)
        one, two = jnp.exp(self.largest - largest), jnp.exp(other.largest - largest)
        return Partial(
            one * self.sum + two * other.sum, one * self.total + two * other.total, largest
        )

    def merge_over(self, axes: tuple[str, ...]) -> Partial:
        """Attention over the keys of all devices along mesh axes."""
        largest = jax.lax.pmax(self.largest, axes)
        scale = jnp.exp(self.largest - largest)
        values, total = jax.lax.psum((scale * self.sum, scale * self.total), axes)
        return Partial(values, total, largest)

    def heads(self, like_BNTH: jax.Array) -> jax.Array:
        """The attention's output, in the shape and dtype of the queries."""
        return (self.sum / self.total).astype(like_BNTH.dtype).reshape(like_BNTH.shape)


def masked_attention(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention of queries to the keys that a mask allows; softmax in float32.

    Args:
      mask_BTS: bool, broadcastable to [B, T, S]; every query needs one allowed key.

    Returns:
      [B, N, T, H] in the dtype of the queries.
    """
    return partial_attention(q_BNTH, k_BKSH, v_BKSH, mask_BTS).heads(q_BNTH)


def partial_attention(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> Partial:
    """Softmax attention to some of the keys, [B, K, G, T, H], to be merged with that to others.

    A query without an allowed key gives junk, to which `merge` gives no weight.
    """
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    G = N // K
    # The queries of a group are rows of one product (R = G·T), so that every product here, and in
    # the backward pass, sums over one axis. XLA transposes copies for two.
    q_BKRH = q_BNTH.reshape(B, K, G * T, H)
    logits_BKRS = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    mask_BRS = jnp.tile(jnp.broadcast_to(mask_BTS, (len(mask_BTS), T, S)), (1, G, 1))
    logits_BKRS = jnp.where(mask_BRS[:, None], logits_BKRS / math.sqrt(H), MASKED)
    # The softmax's denominator divides the [T, H] outputs instead of the [T, S] weights. Its result
    # does not depend on the maximum, so neither does the gradient.
    largest = jax.lax.stop_gradient(jnp.max(logits_BKRS, axis=-1, keepdims=True))
    weights_BKRS = jnp.exp(logits_BKRS - largest)
    sum_BKRH = jnp.einsum(
        "BKRS,BKSH->BKRH",
        weights_BKRS.astype(v_BKSH.dtype),
        v_BKSH,
        preferred_element_type=jnp.float32,
    )
    total = jnp.sum(weights_BKRS, axis=-1, keepdims=True)
    partial = Partial(sum_BKRH, total, largest)
    # The weights are the largest array. The backward pass of a rematerialised layer makes them
    # again of the largest logits.
    return Partial(*(checkpoint_name(x, ATTENTION).reshape(B, K, G, T, -1) for x in partial))


def causal_attention(
    q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, documents_BT: jax.Array | None
) -> jax.Array:
    """Attention of every position to itself and all earlier ones of its document, [B, N, T, H].

    Each block of queries is multiplied with the keys up to its own end alone.
    """
    T = q_BNTH.shape[2]
    block = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        mask_BTS = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop))[None]
        if documents_BT is not None:
            mask_BTS &= documents_BT[:, start:stop, None] == documents_BT[:, None, :stop]
        keys, values = k_BKTH[:, :, :stop], v_BKTH[:, :, :stop]
        outs.append(masked_attention(q_BNTH[:, :, start:stop], keys, values, mask_BTS))
    return jnp.concatenate(outs, axis=2)


def windowed_attention(
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    documents_BT: jax.Array | None,
    window: int,
) -> jax.Array:
    """Attention of every position to the last `window` keys of its document, itself included.

    Returns [B, N, T, H]. Work and memory grow as T·window: each block of queries is multiplied with
    its own block of keys and the one before, which together hold every key of its windows.
    """
    B, N, T, H = q_BNTH.shape
    block = min(max(window - 1, MIN_BLOCK), T)
    blocks = -(-T // block)
    padded = blocks * block

    def split(x_BKTH: jax.Array) -> jax.Array:
        """Turns blocks into batch rows, [B·blocks, K, block, H]."""
        x_BKTH = jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, padded - T), (0, 0)))
        heads = x_BKTH.shape[1]
        x = x_BKTH.reshape(B, heads, blocks, block, H).swapaxes(1, 2)
        return x.reshape(B * blocks, heads, block, H)

    def with_previous(x: jax.Array, rows: int = B) -> jax.Array:
        """Puts before each block [rows·blocks, ..., block, H] the previous one of its sequence."""
        x = x.reshape(rows, blocks, *x.shape[1:])
        previous = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        pairs = jnp.concatenate([previous, x], axis=-2)
        return pairs.reshape(rows * blocks, *pairs.shape[2:])

    distance = (block + jnp.arange(block))[:, None] - jnp.arange(2 * block)[None, :]
    mask = (distance >= 0) & (distance < window)
    # Document 0 is the padding before the first block.
    numbers_BT = jnp.ones((1, T), jnp.int32) if documents_BT is None else documents_BT + 1
    rows = numbers_BT.shape[0]
    numbers = jnp.pad(numbers_BT, ((0, 0), (0, padded - T))).reshape(rows * blocks, block, 1)
    mask = mask & (numbers == with_previous(numbers, rows)[:, None, :, 0])
    mask = jnp.broadcast_to(mask.reshape(rows, blocks, block, -1), (B, blocks, block, 2 * block))
    out = masked_attention(
        split(q_BNTH),
        with_previous(split(k_BKTH)),
        with_previous(split(v_BKTH)),
        mask.reshape(B * blocks, block, 2 * block),
    )
    out_BNTH = out.reshape(B, blocks, N, block, H).swapaxes(1, 2).reshape(B, N, padded, H)
    return out_BNTH[:, :, :T]
