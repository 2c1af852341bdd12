"""Generation: chunked prefill of ragged prompts, then decode steps in a loop on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import Cache, init_cache
from plt_jax.decoding.checks import check_prompts, check_stop_tokens
from plt_jax.decoding.layout import Params, prepare_for_decode
from plt_jax.decoding.prefill import prefill
from plt_jax.decoding.sampling import Sampling, sample
from plt_jax.decoding.step import decode_step
from plt_jax.distributed.axes import shard
from plt_jax.errors import InputError

PREFILL_CHUNK = 256  # Bounds prefill's memory, which grows with the chunk.
BLOCK = 32  # Tokens that the device makes between two looks of the host, when all are wanted.
STREAMED_BLOCK = 4  # The same when they are shown as they come.

_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=4)


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    stop_tokens: Sequence[Sequence[int]] | None = None,
    log_probabilities: bool = False,
    cache_dtype: jnp.dtype | str | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Continues every prompt.

    Args:
      prompts: token ids of each sequence; lengths may differ, none may be 0.
      max_new_tokens: tokens to add to each.
      key: of the draws; not needed with temperature 0. One key, with which row b draws as
        `fold_in(key, b)`, or an array of one key per prompt. Either way what a prompt draws depends
        on its key, its step and its own logits alone, not on what else is in the batch.
      stop_tokens: for each prompt the tokens that end it, besides those of `sampling`.
      log_probabilities: also return how likely the model, at temperature 1 and with no token left
        out, held each new token.
      cache_dtype: as in `init_cache`.

    Returns:
      The new tokens, int32 [B, max_new_tokens]; after a stop token a row repeats it. On request
      with their log-probabilities in nats, float32 of the same shape, 0 for repetitions.

    Raises:
      InputError: a prompt that is empty, holds an unknown token, or leaves no room for
        max_new_tokens within config.max_length; a stop token outside the vocabulary; or keys or
        lists of stop tokens that are not one per prompt.
    """
    request = _Request(
        config, prompts, max_new_tokens, sampling, key, stop_tokens, cache_dtype, log_probabilities
    )
    blocks = list(_blocks(request, params, BLOCK))
    tokens, logs = (np.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True))
    missing = max_new_tokens - tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, missing)), mode="edge")
    logs = np.pad(logs, ((0, 0), (0, missing)))
    return (tokens, logs) if log_probabilities else tokens


def stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    stop_tokens: Sequence[Sequence[int]] | None = None,
    cache_dtype: jnp.dtype | str | None = None,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the tokens int32 [B] of each step, until all rows have stopped."""
    request = _Request(
        config, prompts, max_new_tokens, sampling, key, stop_tokens, cache_dtype, False
    )
    blocks = _blocks(request, params, STREAMED_BLOCK)
    return (column for tokens, _ in blocks for column in tokens.T)


class _Request(NamedTuple):
    """What is asked of `generate` or `stream`; see there."""

    config: ModelConfig
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    key: jax.Array | None
    stop_tokens: Sequence[Sequence[int]] | None
    cache_dtype: jnp.dtype | str | None
    log_probabilities: bool


def _blocks(
    request: _Request, params: Params, block: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and log-probabilities [B, n], n up to `block`; what is refused is so at the call."""
    config, rows = request.config, len(request.prompts)
    request.sampling.check()
    check_prompts(config, request.prompts, request.max_new_tokens)
    check_stop_tokens(config, request.sampling, request.stop_tokens, rows)
    keys_B = _keys(request.key, request.sampling, rows)
    longest = max(map(len, request.prompts)) + request.max_new_tokens
    # Rounded up, so that prompts of many lengths share few compiled programs.
    capacity = -(-longest // PREFILL_CHUNK) * PREFILL_CHUNK
    cache = init_cache(config, rows, capacity, request.cache_dtype)
    return _run(request, prepare_for_decode(config, params), keys_B, cache, block)


def _keys(key: jax.Array | None, sampling: Sampling, rows: int) -> jax.Array:
    """One key per prompt."""
    if key is None:
        if sampling.temperature > 0:
            raise InputError("sampling with a temperature above 0 needs a key")
        key = jax.random.key(0)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))
    if key.shape != (rows,):
        raise InputError(f"key has shape {key.shape}; give one key, or one for each of {rows}")
    return key


def _stops(request: _Request) -> np.ndarray:
    """Each row's stop tokens, int32 [B, M], filled up with -1, which no token is."""
    own = request.stop_tokens
    own = [()] * len(request.prompts) if own is None else own
    lists = [[*request.sampling.stop_tokens, *stops] for stops in own]
    filled = np.full((len(lists), max(map(len, lists))), -1, np.int32)
    for row, stops in zip(filled, lists, strict=True):
        row[: len(stops)] = stops
    return filled


class Choice(NamedTuple):
    """How tokens are chosen, as far as compiled programs depend on it."""

    sampling: Sampling
    """Its stop tokens are not read."""
    log_probabilities: bool = False
    """Whether they are computed; else they are 0."""


@flax.struct.dataclass
class GenerationState:
    """Between two tokens."""

    cache: Cache
    tokens_B: jax.Array
    """The newest tokens, int32 [B]: drawn, and not in the cache yet."""
    running_B: jax.Array
    """Which rows have not met a stop token."""
    index: jax.Array
    """Which of the new tokens those are, from 0."""


def _run(
    request: _Request, params: Params, keys_B: jax.Array, cache: Cache, block: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rows, config = len(request.prompts), request.config
    # Stop tokens are data like prompts: others compile nothing anew.
    choice = Choice(request.sampling._replace(stop_tokens=()), request.log_probabilities)
    stops_BM = _stops(request)
    logits_BV, cache = prefill_prompts(config, params, request.prompts, cache)
    state = GenerationState(
        cache, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool), jnp.zeros((), jnp.int32)
    )
    tokens_B, logs_B, running_B = _choose(choice, logits_BV, keys_B, stops_BM, state)
    state = state.replace(tokens_B=tokens_B, running_B=running_B)
    yield np.asarray(tokens_B)[:, None], np.asarray(logs_B)[:, None]
    made = 1
    while made < request.max_new_tokens and np.any(state.running_B):
        count = min(block, request.max_new_tokens - made)
        state, tokens_nB, logs_nB = advance(config, choice, params, keys_B, stops_BM, state, count)
        new = int(state.index) + 1 - made
        made += new
        yield np.asarray(tokens_nB[:new]).T, np.asarray(logs_nB[:new]).T


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def advance(
    config: ModelConfig,
    choice: Choice,
    params: Params,
    keys_B: jax.Array,
    stops_BM: jax.Array,
    state: GenerationState,
    count: jax.Array,
) -> tuple[GenerationState, jax.Array, jax.Array]:
    """Makes up to `count` more tokens on the device, fewer where all rows stop.

    One program for any count up to BLOCK, so that streaming compiles nothing of its own.

    Args:
      keys_B: of each row's draws.
      stops_BM: int32, tokens that end each row; -1 where there are fewer than M.
      state: donated.

    Returns:
      The state after them, the tokens and their log-probabilities, [BLOCK, B] each; behind the
      tokens made, which `state.index` counts, is junk.
    """
    B = state.tokens_B.shape[0]

    def goes_on(carry):
        state, done, _, _ = carry
        return (done < count) & jnp.any(state.running_B)

    def step(carry):
        state, done, tokens_nB, logs_nB = carry
        logits_BV, cache = decode_step(config, params, state.tokens_B, state.cache)
        state = state.replace(cache=cache, index=state.index + 1)
        tokens_B, logs_B, running_B = _choose(choice, logits_BV, keys_B, stops_BM, state)
        state = state.replace(tokens_B=tokens_B, running_B=running_B)
        return state, done + 1, tokens_nB.at[done].set(tokens_B), logs_nB.at[done].set(logs_B)

    nothing = jnp.zeros((BLOCK, B), jnp.int32), jnp.zeros((BLOCK, B), jnp.float32)
    state, _, tokens_nB, logs_nB = jax.lax.while_loop(goes_on, step, (state, 0, *nothing))
    return state.replace(index=shard(state.index)), shard(tokens_nB), shard(logs_nB)


@partial(jax.jit, static_argnums=0)
def _choose(
    choice: Choice,
    logits_BV: jax.Array,
    keys_B: jax.Array,
    stops_BM: jax.Array,
    state: GenerationState,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token of each row, its log-probability, and which rows go on.

    A row that has stopped repeats its last.
    """
    step_keys_B = jax.vmap(partial(jax.random.fold_in, data=state.index))(keys_B)
    drawn_B = sample(logits_BV, choice.sampling, step_keys_B)
    tokens_B = jnp.where(state.running_B, drawn_B, state.tokens_B)
    logs_B = jnp.zeros(tokens_B.shape, jnp.float32)
    if choice.log_probabilities:
        logs_BV = jax.nn.log_softmax(logits_BV)
        logs_B = jnp.take_along_axis(logs_BV, tokens_B[:, None], axis=1)[:, 0]
    stopped_B = jnp.any(tokens_B[:, None] == stops_BM, axis=1)
    logs_B, running_B = jnp.where(state.running_B, logs_B, 0.0), state.running_B & ~stopped_B
    return shard(tokens_B), shard(logs_B), shard(running_B)  # every process reads them


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
