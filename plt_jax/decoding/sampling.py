"""Choosing the next token from logits."""

from __future__ import annotations

import math
from typing import NamedTuple

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


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """Draws one token per row with that row's own key, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    allowed_BV = restrict(logits_BV / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, allowed_BV).astype(jnp.int32)


def restrict(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits with the tokens outside top_k and top_p at -inf; ties with the last kept stay in."""
    V = logits_BV.shape[-1]
    if 0 < sampling.top_k < V:
        kept_BK, _ = jax.lax.top_k(logits_BV, sampling.top_k)
        logits_BV = jnp.where(logits_BV < kept_BK[:, -1:], -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_B1 = jnp.sum(before_BV < sampling.top_p, axis=-1, keepdims=True)
        smallest_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return logits_BV
