"""Generation: chunked prefill of ragged prompts, then decode steps, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import Cache, Params, init_cache, prepare_for_decode
from plt_jax.decoding.prefill import prefill
from plt_jax.decoding.sampling import Sampling, sample
from plt_jax.decoding.step import decode_step
from plt_jax.errors import InputError

PREFILL_CHUNK = 256  # Bounds prefill's memory at chunk x cache.

_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=4)
_decode_step = jax.jit(decode_step, static_argnums=0, donate_argnums=3)


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
) -> np.ndarray:
    """Continues every prompt.

    Args:
      prompts: token ids of each sequence; lengths may differ, none may be 0.
      max_new_tokens: tokens to add to each.
      key: of the draws; not needed with temperature 0. Row b draws with `fold_in(key, b)`, so its
        continuation does not depend on the other prompts.

    Returns:
      The new tokens, int32 [B, max_new_tokens]; after a stop token a row repeats it.

    Raises:
      InputError: a prompt that is empty, holds an unknown token, or leaves no room for
        max_new_tokens within config.max_length.
    """
    columns = list(stream(config, params, prompts, max_new_tokens, sampling, key))
    columns += columns[-1:] * (max_new_tokens - len(columns))
    return np.stack(columns, axis=1)


def stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the tokens int32 [B] of each step, until all rows have stopped."""
    sampling.check()
    _check_prompts(config, prompts, max_new_tokens)
    if key is None:
        if sampling.temperature > 0:
            raise InputError("sampling with a temperature above 0 needs a key")
        key = jax.random.key(0)
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(prompts)))
    return _stream(
        config, prepare_for_decode(config, params), prompts, max_new_tokens, sampling, keys_B
    )


def _stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    keys_B: jax.Array,
) -> Iterator[np.ndarray]:
    """The generator behind `stream`, whose own checks run at the call."""
    longest = max(map(len, prompts)) + max_new_tokens
    # Rounded up, so that prompts of many lengths share few compiled programs.
    capacity = -(-longest // PREFILL_CHUNK) * PREFILL_CHUNK
    cache = init_cache(config, len(prompts), capacity)
    logits_BV, cache = prefill_prompts(config, params, prompts, cache)
    running_B = jnp.ones(len(prompts), bool)
    tokens_B = jnp.zeros(len(prompts), jnp.int32)
    for index in range(max_new_tokens):
        tokens_B, running_B = _choose(sampling, logits_BV, keys_B, index, tokens_B, running_B)
        yield np.asarray(tokens_B)
        if not np.any(running_B):
            return
        if index + 1 < max_new_tokens:
            logits_BV, cache = _decode_step(config, params, tokens_B, cache)


@partial(jax.jit, static_argnums=0)
def _choose(
    sampling: Sampling,
    logits_BV: jax.Array,
    keys_B: jax.Array,
    index: jax.Array,
    previous_B: jax.Array,
    running_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, and which rows go on; a row that has stopped repeats its last."""
    drawn_B = sample(
        logits_BV, sampling, jax.vmap(lambda key: jax.random.fold_in(key, index))(keys_B)
    )
    tokens_B = jnp.where(running_B, drawn_B, previous_B)
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)
    return tokens_B, running_B & ~jnp.isin(tokens_B, stops)


def prefill_prompts(
    config: ModelConfig, params: Params, prompts: Sequence[Sequence[int]], cache: Cache
) -> tuple[jax.Array, Cache]:
    """Prefills ragged prompts chunk by chunk; returns the logits [B, V] after each prompt's end.

    The cache given is donated.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths_B.max())
    chunk = min(PREFILL_CHUNK, cache.capacity, 1 << (longest - 1).bit_length())
    padded = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits_BV = None
    for start in range(0, padded.shape[1], chunk):
        real_B = np.clip(lengths_B - start, 0, chunk).astype(np.int32)
        new_BV, cache = _prefill(config, params, padded[:, start : start + chunk], real_B, cache)
        ends_here = (real_B > 0)[:, None]
        logits_BV = new_BV if logits_BV is None else jnp.where(ends_here, new_BV, logits_BV)
    return logits_BV, cache


def _check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if not prompts:
        raise InputError("no prompts were given; give at least one")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {index} is empty; begin it with the begin-of-text token")
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise InputError(
                f"prompt {index} holds token {wrong[0]}, outside the vocabulary of "
                f"{config.vocab_size}"
            )
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
