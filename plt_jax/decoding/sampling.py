"""Choosing the next token from logits.

`sample` draws all rows of a batch alike, as a compiled program knows beforehand. `sample_rows`
draws each row in its own way, which is data, so that a server compiles one program for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from plt_jax.errors import InputError


class Sampling(NamedTuple):
    """How tokens are drawn; hashable, so that it can be static under jit."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens whose probabilities reach this sum, after top_k."""
    stop_tokens: tuple[int, ...] = ()
    """A sequence ends with the first of these that it draws."""

    def check(self) -> None:
        """Raises InputError for a value outside its range."""
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


class RowSampling(flax.struct.PyTreeNode):
    """How each of B rows is drawn; the fields of one name mean what they mean in Sampling."""

    temperature_B: jax.Array
    """float32."""
    top_k_B: jax.Array
    """int32."""
    top_p_B: jax.Array
    """float32."""
    min_p_B: jax.Array
    """float32, 0 to 1: tokens less likely than this share of the most likely one are left out."""
    repetition_penalty_B: jax.Array
    """float32, above 0. Logits of tokens that the prompt or the text has are divided by it if they
    are positive, and multiplied with it if they are negative (CTRL, arXiv 1909.05858)."""
    presence_penalty_B: jax.Array
    """float32, subtracted once from the logits of tokens that the text has."""
    frequency_penalty_B: jax.Array
    """float32, subtracted for each time that the text has a token."""


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """Draws one token per row with that row's own key, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / sampling.temperature
    if sampling.top_k > 0 or sampling.top_p < 1:
        B = logits_BV.shape[0]
        top_k_B, top_p_B = jnp.full(B, sampling.top_k), jnp.full(B, sampling.top_p)
        scaled_BV = restrict(scaled_BV, top_k_B, top_p_B, jnp.zeros(B))
    return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)


def sample_rows(logits_BV: jax.Array, rows: RowSampling, keys_B: jax.Array) -> jax.Array:
    """Draws one token per row in that row's own way, int32 [B].

    A row draws what `sample` draws with its key and settings. What no row asks for takes no time.
    """
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn_B = rows.temperature_B > 0

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(drawn_B, rows.temperature_B, 1)[:, None]
        restricted = (rows.top_k_B > 0) | (rows.top_p_B < 1) | (rows.min_p_B > 0)
        allowed_BV = jax.lax.cond(
            jnp.any(drawn_B & restricted),
            lambda: restrict(scaled_BV, rows.top_k_B, rows.top_p_B, rows.min_p_B),
            lambda: scaled_BV,
        )
        return jax.vmap(jax.random.categorical)(keys_B, allowed_BV).astype(jnp.int32)

    drawn = jax.lax.cond(jnp.any(drawn_B), draw, lambda: likeliest_B)
    return jnp.where(drawn_B, drawn, likeliest_B)


def penalize(
    logits_BV: jax.Array, rows: RowSampling, seen_BV: jax.Array, counts_BV: jax.Array
) -> jax.Array:
    """Logits after the penalties of each row.

    Args:
      seen_BV: bool, which tokens the prompt or the text has.
      counts_BV: int32, how often the text has each token.
    """
    repetition_B1 = rows.repetition_penalty_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(seen_BV, repeated_BV, logits_BV)
    presence_BV = rows.presence_penalty_B[:, None] * (counts_BV > 0)
    return logits_BV - presence_BV - rows.frequency_penalty_B[:, None] * counts_BV


def restrict(
    logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """Logits with the tokens outside top_k, top_p and min_p at -inf; see RowSampling.

    Ties with the last token that stays are in. A sort takes longer than a decode step on a CPU, and
    an array of the k most likely tokens has a size that rows differ in. So the least logit that
    stays is found bit by bit.
    """
    ordered_BV = _ordered(logits_BV)
    V = logits_BV.shape[-1]
    most_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
    least_B = _largest(lambda at_B1: jnp.sum(ordered_BV >= at_B1, axis=-1) >= most_B)
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    weights_BV = jnp.where(ordered_BV >= least_B[:, None], weights_BV, 0)

    def weight_from(at_B1: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ordered_BV >= at_B1, weights_BV, 0), axis=-1)

    share_B = top_p_B * jnp.sum(weights_BV, axis=-1)
    reaching_B = _largest(lambda at_B1: weight_from(at_B1) >= share_B)
    # Sums of all weights in two orders may differ in the last bit, so 1 is not compared.
    least_B = jnp.where(top_p_B < 1, jnp.maximum(least_B, reaching_B), least_B)
    # Weights that are NaN stay in, since a draw takes them and generation then stops.
    is_kept_BV = (ordered_BV >= least_B[:, None]) & ~(weights_BV < min_p_B[:, None])
    return jnp.where(is_kept_BV, logits_BV, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 numbers in the order of float32 ones; NaN of either sign is the largest."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits & sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(x), jnp.uint32(0xFFFFFFFF), ordered)


def _largest(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest uint32 for which a condition holds, [B]; it holds for 0 and below that number.

    Args:
      holds: takes numbers [B, 1]; returns bool [B].
    """

    def with_bit(index: jax.Array, found_B1: jax.Array) -> jax.Array:
        tried_B1 = found_B1 | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(holds(tried_B1)[:, None], tried_B1, found_B1)

    rows = jax.eval_shape(holds, jax.ShapeDtypeStruct((1, 1), jnp.uint32)).shape
    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((*rows, 1), jnp.uint32))[:, 0]
