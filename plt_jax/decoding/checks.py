"""Checks of input to decoding, before any device work.

Shapes are always known. Values are known outside of jit alone; there, these functions wait for the
arrays that they read, such as the lengths that the step before computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import Cache
from plt_jax.decoding.sampling import Sampling
from plt_jax.errors import InputError


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises InputError unless every prompt can be continued by `max_new_tokens`."""
    if not len(prompts):
        raise InputError("no prompts were given; give at least one")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {index} is empty; begin it with the begin-of-text token")
        _check_tokens(config, np.asarray(prompt), f"prompt {index}")
        room = config.max_length - len(prompt)
        if room < 1:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens, but the context holds "
                f"{config.max_length}, one of them new; shorten it to {config.max_length - 1}"
            )
        if room < max_new_tokens:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens and {max_new_tokens} new ones are asked "
                f"for, but the context holds {config.max_length}; ask for at most {room}"
            )


def check_stop_tokens(
    config: ModelConfig,
    sampling: Sampling,
    stop_tokens: Sequence[Sequence[int]] | None,
    prompts: int,
) -> None:
    """Raises InputError unless all are tokens, and their lists one per prompt."""
    _check_tokens(config, np.array(sampling.stop_tokens, int), "sampling.stop_tokens")
    if stop_tokens is None:
        return
    if len(stop_tokens) != prompts:
        raise InputError(
            f"stop_tokens are given for {len(stop_tokens)} prompts, but there are {prompts}"
        )
    for index, stops in enumerate(stop_tokens):
        if np.ndim(stops) != 1:
            raise InputError(f"stop_tokens[{index}] is {stops}; give a list for every prompt")
        _check_tokens(config, np.asarray(stops, int), f"stop_tokens[{index}]")


def check_chunk(
    config: ModelConfig, tokens_BC: jax.Array, lengths_B: jax.Array, cache: Cache
) -> None:
    """Raises InputError unless the chunk can be appended to the cache."""
    if np.ndim(tokens_BC) != 2:
        raise InputError(f"tokens must have shape (batch, chunk), got {np.shape(tokens_BC)}")
    _check_batch(tokens_BC, cache)
    B, C = np.shape(tokens_BC)
    if np.shape(lengths_B) != (B,):
        raise InputError(f"lengths must have shape ({B},), got {np.shape(lengths_B)}")
    if not 1 <= C <= cache.capacity:
        raise InputError(f"a chunk of {C} tokens does not fit a cache of {cache.capacity}")
    if _unknown(lengths_B):
        return
    lengths = np.asarray(lengths_B)
    for row in np.flatnonzero((lengths < 0) | (lengths > C)):
        raise InputError(f"lengths[{row}] is {lengths[row]}; it must be 0 to {C}, the chunk's size")
    _check_room(lengths, cache)
    if not _unknown(tokens_BC):
        real_BC = np.arange(C) < lengths[:, None]
        _check_tokens(config, np.where(real_BC, np.asarray(tokens_BC), 0), "tokens")


def check_step(config: ModelConfig, tokens_B: jax.Array, cache: Cache) -> None:
    """Raises InputError unless one token can be appended to every sequence of the cache."""
    if np.ndim(tokens_B) != 1:
        raise InputError(f"tokens must have shape (batch,), got {np.shape(tokens_B)}")
    _check_batch(tokens_B, cache)
    if _unknown(tokens_B):
        return
    _check_room(np.ones(len(tokens_B), int), cache)
    _check_tokens(config, np.asarray(tokens_B), "tokens")


def _unknown(array: jax.Array) -> bool:
    """Whether the values are not known here: inside of jit, or partly in other processes."""
    if isinstance(array, Tracer):
        return True
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )


def _check_batch(tokens: jax.Array, cache: Cache) -> None:
    sequences = cache.lengths.shape[0]
    if np.shape(tokens)[0] != sequences:
        raise InputError(
            f"tokens of shape {np.shape(tokens)} do not match a cache of {sequences} sequences"
        )


def _check_room(new: np.ndarray, cache: Cache) -> None:
    """Raises InputError unless the cache has room for `new` tokens [B] of the sequences."""
    if _unknown(cache.lengths):
        return
    held = np.asarray(cache.lengths)
    for row in np.flatnonzero(held + new > cache.capacity):
        raise InputError(
            f"sequence {row} holds {held[row]} tokens and is given {new[row]} more, but the cache "
            f"has room for {cache.capacity}; make it longer, or stop"
        )


def _check_tokens(config: ModelConfig, tokens: np.ndarray, name: str) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"{name} must hold whole numbers, got {tokens.dtype}")
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise InputError(
            f"{name} holds token {wrong.ravel()[0]}, outside the vocabulary of {config.vocab_size}"
        )
