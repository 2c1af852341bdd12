"""Measures of what loops change in states, attention and predictions (LoopCoder-v2).

Axes: T positions, D width, N query heads, S keys, V vocabulary. All values are float32. Measures
are per position; the caller averages them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

TINY = 1e-30


def distance(states_TD: jax.Array, others_TD: jax.Array) -> jax.Array:
    """‖h - h'‖₂ of each position, [T]: the step size δ between loops, and the fixed-point gap
    between a state and what one more loop makes of it."""
    return jnp.linalg.norm(states_TD - others_TD, axis=-1)


def turn(newest_TD: jax.Array, middle_TD: jax.Array, oldest_TD: jax.Array) -> jax.Array:
    """cosθ: the cosine of each position's update with the update before it, [T]; 0 where one of
    the two is zero."""
    update_TD, before_TD = newest_TD - middle_TD, middle_TD - oldest_TD
    lengths_T = jnp.linalg.norm(update_TD, axis=-1) * jnp.linalg.norm(before_TD, axis=-1)
    return jnp.sum(update_TD * before_TD, axis=-1) / jnp.maximum(lengths_T, TINY)


def effective_rank(singular: jax.Array) -> jax.Array:
    """exp of the entropy of singular values [..., K] over their sum: 1 where all but one are 0, K
    where they are even."""
    share = singular / jnp.maximum(jnp.sum(singular, axis=-1, keepdims=True), TINY)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, TINY)), axis=-1))


def rank_of_states(states_TD: jax.Array, counted_T: jax.Array) -> jax.Array:
    """Effective rank of the counted positions' states, each divided by its root mean square."""
    rms_T1 = jnp.sqrt(jnp.mean(jnp.square(states_TD), axis=-1, keepdims=True))
    normed_TD = jnp.where(counted_T[:, None], states_TD / jnp.maximum(rms_T1, TINY), 0.0)
    return effective_rank(jnp.linalg.svd(normed_TD, compute_uv=False))


def offset_cost(states_TD: jax.Array) -> jax.Array:
    """‖h[i] - h[i-1]‖₂ of each position but the first, [T] with 0 there: how far a state is from
    the one that the shift puts in its place (Ω is its mean, whatever is learned)."""
    return jnp.pad(distance(states_TD[1:], states_TD[:-1]), (1, 0))


def attention_entropy(attention_NTS: jax.Array) -> jax.Array:
    """-Σ A log A in nats, mean over heads, [T]."""
    logs_NTS = jnp.log(jnp.maximum(attention_NTS, TINY))
    return jnp.mean(-jnp.sum(attention_NTS * logs_NTS, axis=-1), axis=0)


def attention_change(attention_NTS: jax.Array, before_NTS: jax.Array) -> jax.Array:
    """KL(A ‖ A of the loop before) in nats, mean over heads, [T]."""
    ratio_NTS = jnp.maximum(attention_NTS, TINY) / jnp.maximum(before_NTS, TINY)
    return jnp.mean(jnp.sum(attention_NTS * jnp.log(ratio_NTS), axis=-1), axis=0)


def head_diversity(attention_NTS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The effective rank of each query's N x S attention, and the mean cosine of two heads, [T]."""
    products_TNN = jnp.einsum("NTS,MTS->TNM", attention_NTS, attention_NTS)
    singular_TN = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(products_TNN), 0.0))
    lengths_TN = jnp.sqrt(jnp.maximum(jnp.diagonal(products_TNN, axis1=1, axis2=2), TINY))
    cosines_TNN = products_TNN / (lengths_TN[:, :, None] * lengths_TN[:, None, :])
    N = attention_NTS.shape[0]
    others_T = (jnp.sum(cosines_TNN, axis=(1, 2)) - N) / max(N * (N - 1), 1)
    return effective_rank(singular_TN), others_T if N > 1 else jnp.ones_like(others_T)


def output_shift(log_p_TV: jax.Array, log_before_TV: jax.Array) -> jax.Array:
    """Δp = KL(p ‖ p of the loop before) in nats, [T]."""
    return jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_before_TV), axis=-1)


def entropy(log_p_TV: jax.Array) -> jax.Array:
    """-Σ p log p in nats, [T]."""
    return -jnp.sum(jnp.exp(log_p_TV) * log_p_TV, axis=-1)


def rank_of_truth(log_p_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """Rank of the true token, 1 if it is the most probable, [T] as float32."""
    true_T1 = jnp.take_along_axis(log_p_TV, targets_T[:, None], axis=-1)
    return 1.0 + jnp.sum(log_p_TV > true_T1, axis=-1, dtype=jnp.float32)
