"""Generation: chunked prefill of ragged prompts, then decode steps in a loop on the device."""

from __future__ import annotations

import operator
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
from plt_jax.decoding.early_exit import ExitRule, check_rule
from plt_jax.decoding.prefill import prefill
from plt_jax.decoding.sampling import Sampling, sample
from plt_jax.decoding.step import decode_step, step_until_exit
from plt_jax.decoding.weights import DecodeWeights, Params, prepare_for_decode
from plt_jax.distributed.axes import shard
from plt_jax.errors import InputError

PREFILL_CHUNK = 256
"""Tokens of a chunk, which bound the memory of prefill."""
BLOCK = 32
"""Tokens that the device generates before the host reads them."""
STREAMED_BLOCK = 4
"""The same, where text is shown while it is generated."""

NOT_FINITE = -1
"""The token of a step whose logits are not finite."""

_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=4)


class Generated(NamedTuple):
    """New tokens, and how they came about."""

    tokens: np.ndarray
    """int32 [B, n]."""
    log_probabilities: np.ndarray
    """float32 [B, n], in nats; 0 if they were not asked for."""
    decoded: int
    """The number of tokens that decode steps have read, without those of rows that had stopped. 0
    without an exit rule, for which nothing is counted."""
    loops: int
    """The loops that these tokens ran, together."""


class GenerationRequest(NamedTuple):
    """What one call asks to generate."""

    prompts: Sequence[Sequence[int]]
    """Token ids of each sequence; lengths may differ, none may be 0."""
    max_new_tokens: int
    """Number of tokens to add to each prompt."""
    sampling: Sampling = Sampling()
    """How tokens are drawn."""
    key: jax.Array | None = None
    """Key of the draws: one key, with which row b draws as `fold_in(key, b)`, or an array of one
    key per prompt. Not needed with temperature 0. What a prompt draws depends on its key, its step
    and its own logits alone, not on the rest of the batch."""
    stop_tokens: Sequence[Sequence[int]] | None = None
    """For each prompt the tokens that end it, in addition to those of `sampling`."""
    log_probabilities: bool = False
    """Whether log-probabilities are computed; else they are 0."""
    cache_dtype: jnp.dtype | str | None = None
    """The cache's dtype; see `init_cache`."""
    exit_rule: ExitRule | None = None
    """Where new tokens stop their loops, in schemes without a shift; default none, all loops run.
    Those of prompts always run all."""

    def check(self, config: ModelConfig) -> None:
        """Raises InputError for a request that the model cannot serve; see `generate`."""
        self.sampling.check()
        check_prompts(config, self.prompts, self.max_new_tokens)
        check_stop_tokens(config, self.sampling, self.stop_tokens, len(self.prompts))
        if self.exit_rule is not None:
            check_rule(config, self.exit_rule)

    def keys(self) -> jax.Array:
        """One key per prompt [B].

        Raises:
          InputError: a key is missing, or there is not one for each prompt.
        """
        key, rows = self.key, len(self.prompts)
        if key is None:
            if self.sampling.temperature > 0:
                raise InputError("sampling with a temperature above 0 needs a key")
            key = jax.random.key(0)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        if key.ndim == 0:
            return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))
        if key.shape != (rows,):
            raise InputError(f"key has shape {key.shape}; give one key, or one for each of {rows}")
        return key

    def stops(self) -> np.ndarray:
        """The stop tokens of each prompt, int32 [B, M], filled up with NOT_FINITE, at least one."""
        own = [()] * len(self.prompts) if self.stop_tokens is None else self.stop_tokens
        rows = [[*self.sampling.stop_tokens, *stops] for stops in own]
        filled = np.full((len(rows), max(map(len, rows)) + 1), NOT_FINITE, np.int32)
        for row, stops in zip(filled, rows, strict=True):
            row[: len(stops)] = stops
        return filled

    def empty_cache(self, config: ModelConfig) -> Cache:
        """A cache with room for every prompt and its new tokens."""
        longest = max(map(len, self.prompts)) + self.max_new_tokens
        # Rounded up, so that prompts of many lengths share few compiled programs.
        capacity = -(-longest // PREFILL_CHUNK) * PREFILL_CHUNK
        return init_cache(config, len(self.prompts), capacity, self.cache_dtype)


def generate(
    config: ModelConfig,
    params: Params | DecodeWeights,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    stop_tokens: Sequence[Sequence[int]] | None = None,
    log_probabilities: bool = False,
    cache_dtype: jnp.dtype | str | None = None,
    exit_rule: ExitRule | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Continues every prompt; the arguments are those of GenerationRequest.

    Args:
      params: as `Transformer.init` returns them, or as `prepare_for_decode` lays them out.
      log_probabilities: whether to return also the log-probability that the model gives to each new
        token, at temperature 1 and with no token left out.

    Returns:
      The new tokens, int32 [B, max_new_tokens]; after a stop token a row repeats it. On request
      also their log-probabilities in nats, float32 of the same shape, 0 for repetitions.

    Raises:
      InputError: a prompt is empty, holds an unknown token, or leaves no room for max_new_tokens
        within config.max_length; a stop token lies outside of the vocabulary; keys or lists of
        stop tokens are not one per prompt; the model's steps cannot end by the exit rule; or a
        logit is not finite.
    """
    request = GenerationRequest(
        *(prompts, max_new_tokens, sampling, key, stop_tokens, log_probabilities, cache_dtype),
        exit_rule=exit_rule,
    )
    made = generate_all(config, params, request)
    return (made.tokens, made.log_probabilities) if log_probabilities else made.tokens


def generate_all(
    config: ModelConfig, params: Params | DecodeWeights, request: GenerationRequest
) -> Generated:
    """All new tokens, [B, max_new_tokens]; see `generate`."""
    blocks = list(_generate_blocks(config, params, request, BLOCK))
    tokens = np.concatenate([block.tokens for block in blocks], axis=1)
    logs = np.concatenate([block.log_probabilities for block in blocks], axis=1)
    missing = request.max_new_tokens - tokens.shape[1]
    return Generated(
        np.pad(tokens, ((0, 0), (0, missing)), mode="edge"),
        np.pad(logs, ((0, 0), (0, missing))),
        sum(block.decoded for block in blocks),
        sum(block.loops for block in blocks),
    )


class TokenStream(Iterator[np.ndarray]):
    """The new tokens int32 [B] of each step, until all rows have stopped."""

    decoded: int = 0
    """Of what has been generated so far; see `Generated`. Tokens are generated a few at a time, so
    that it may count some that were not taken yet."""
    loops: int = 0
    """The loops that these tokens ran, together."""

    def __init__(
        self, config: ModelConfig, params: Params | DecodeWeights, request: GenerationRequest
    ):
        """Prefills the prompts.

        Raises:
          InputError: here, or at a step whose logits are not finite; see `generate`.
        """
        blocks = _generate_blocks(config, params, request, STREAMED_BLOCK)
        self._columns = self._count_and_split(blocks)

    def __next__(self) -> np.ndarray:
        return next(self._columns)

    def _count_and_split(self, blocks: Iterator[Generated]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.decoded += block.decoded
            self.loops += block.loops
            yield from block.tokens.T


def _generate_blocks(
    config: ModelConfig, params: Params | DecodeWeights, request: GenerationRequest, block: int
) -> Iterator[Generated]:
    """Yields up to `block` tokens of each row at a time; refuses at the call."""
    request.check(config)
    keys_B, cache = request.keys(), request.empty_cache(config)
    return _run(config, prepare_for_decode(config, params), request, keys_B, cache, block)


class TokenChoice(NamedTuple):
    """The part of a request that compiled programs depend on."""

    sampling: Sampling
    """How tokens are drawn; without stop tokens, which are data."""
    log_probabilities: bool = False
    """Whether log-probabilities are computed; else they are 0."""


class EarlyExits(flax.struct.PyTreeNode):
    """Where tokens stop their loops, and how many have run; see `Generated`."""

    rule: ExitRule
    """Its threshold is an array, so that others compile nothing anew."""
    decoded: jax.Array
    """int32 scalar."""
    loops: jax.Array
    """int32 scalar."""

    @classmethod
    def by(cls, rule: ExitRule) -> EarlyExits:
        """Those of a request, before its first token."""
        threshold = jnp.array(rule.threshold, jnp.float32)  # a copy, since it is donated
        return cls(rule.replace(threshold=threshold), *jnp.zeros(2, jnp.int32))


class GenerationState(flax.struct.PyTreeNode):
    """The state between two tokens."""

    cache: Cache
    tokens_B: jax.Array
    """The newest tokens, int32 [B], which are drawn and not in the cache yet."""
    running_B: jax.Array
    """bool [B], the rows that have not met a stop token."""
    index: jax.Array
    """int32 scalar, the index of those tokens among the new ones, from 0."""
    exits: EarlyExits | None = None
    """None if all tokens run all loops."""


def _run(
    config: ModelConfig,
    weights: DecodeWeights,
    request: GenerationRequest,
    keys_B: jax.Array,
    cache: Cache,
    block: int,
) -> Iterator[Generated]:
    rows = len(request.prompts)
    # Stop tokens are data, as prompts are: others compile nothing anew.
    choice = TokenChoice(request.sampling._replace(stop_tokens=()), request.log_probabilities)
    stops_BM = request.stops()
    logits_BV, cache = prefill_prompts(config, weights, request.prompts, cache)
    state = GenerationState(
        *(cache, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool), jnp.zeros((), jnp.int32)),
        None if request.exit_rule is None else EarlyExits.by(request.exit_rule),
    )
    tokens_B, logs_B, running_B = _choose(choice, logits_BV, keys_B, stops_BM, state)
    state = state.replace(tokens_B=tokens_B, running_B=running_B)
    yield Generated(_checked(np.asarray(tokens_B)[:, None]), np.asarray(logs_B)[:, None], 0, 0)
    done, before = 1, (0, 0)
    while done < request.max_new_tokens and np.any(state.running_B):
        count = min(block, request.max_new_tokens - done)
        state, tokens_nB, logs_nB = advance(config, choice, weights, keys_B, stops_BM, state, count)
        new = int(state.index) + 1 - done
        done += new
        tokens_Bn, logs_Bn = np.asarray(tokens_nB[:new]).T, np.asarray(logs_nB[:new]).T
        exits = state.exits
        counted = (0, 0) if exits is None else (int(exits.decoded), int(exits.loops))
        yield Generated(_checked(tokens_Bn), logs_Bn, *map(operator.sub, counted, before))
        before = counted


def _checked(tokens_Bn: np.ndarray) -> np.ndarray:
    """The tokens, unless a row has met logits that are not finite."""
    if np.any(tokens_Bn == NOT_FINITE):
        raise InputError(
            "the model's logits are not finite (NaN or infinite), so it can write nothing: its "
            "weights are damaged, or its numbers do not fit its dtype (model.dtype)"
        )
    return tokens_Bn


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def advance(
    config: ModelConfig,
    choice: TokenChoice,
    weights: DecodeWeights,
    keys_B: jax.Array,
    stops_BM: jax.Array,
    state: GenerationState,
    count: jax.Array,
) -> tuple[GenerationState, jax.Array, jax.Array]:
    """Generates up to `count` more tokens on the device, fewer if all rows stop.

    One program serves any count up to BLOCK, so that streaming compiles nothing of its own.

    Args:
      keys_B: the key of each row's draws.
      stops_BM: int32, the tokens that end each row; NOT_FINITE where there are fewer than M.
      state: is donated.

    Returns:
      The state after them, the tokens and their log-probabilities, [BLOCK, B] each. Entries after
      the generated tokens, which `state.index` counts, are junk.
    """
    B = state.tokens_B.shape[0]

    def goes_on(carry):
        state, done, _, _ = carry
        return (done < count) & jnp.any(state.running_B)

    def step(carry):
        state, done, tokens_nB, logs_nB = carry
        logits_BV, state = _next_logits(config, weights, state)
        tokens_B, logs_B, running_B = _choose(choice, logits_BV, keys_B, stops_BM, state)
        state = state.replace(tokens_B=tokens_B, running_B=running_B)
        return state, done + 1, tokens_nB.at[done].set(tokens_B), logs_nB.at[done].set(logs_B)

    nothing = jnp.zeros((BLOCK, B), jnp.int32), jnp.zeros((BLOCK, B), jnp.float32)
    state, _, tokens_nB, logs_nB = jax.lax.while_loop(goes_on, step, (state, 0, *nothing))
    return state.replace(index=shard(state.index)), shard(tokens_nB), shard(logs_nB)


def _next_logits(
    config: ModelConfig, weights: DecodeWeights, state: GenerationState
) -> tuple[jax.Array, GenerationState]:
    """Appends the newest tokens to the cache; the logits behind them [B, V], and the state."""
    exits, running_B = state.exits, state.running_B
    if exits is None:
        logits_BV, cache = decode_step(config, weights, state.tokens_B, state.cache)
    else:
        logits_BV, cache, loops_B = step_until_exit(
            config, weights, exits.rule, state.tokens_B, state.cache, running_B
        )
        exits = exits.replace(
            decoded=exits.decoded + jnp.sum(running_B),
            loops=exits.loops + jnp.sum(jnp.where(running_B, loops_B, 0)),
        )
    return logits_BV, state.replace(cache=cache, index=state.index + 1, exits=exits)


@partial(jax.jit, static_argnums=0)
def _choose(
    choice: TokenChoice,
    logits_BV: jax.Array,
    keys_B: jax.Array,
    stops_BM: jax.Array,
    state: GenerationState,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token of each row, its log-probability, and whether the row goes on, [B] each.

    A row that has stopped repeats its last token.
    """
    step_keys_B = jax.vmap(partial(jax.random.fold_in, data=state.index))(keys_B)
    drawn_B = sample(logits_BV, choice.sampling, step_keys_B)
    # NaN and infinity are what a draw takes, and numbers elsewhere do not bring them back.
    drawn_logit_B = jnp.take_along_axis(logits_BV, drawn_B[:, None], axis=1)[:, 0]
    drawn_B = jnp.where(jnp.isfinite(drawn_logit_B), drawn_B, NOT_FINITE)
    tokens_B = jnp.where(state.running_B, drawn_B, state.tokens_B)
    logs_B = jnp.zeros(tokens_B.shape, jnp.float32)
    if choice.log_probabilities:
        logs_BV = jax.nn.log_softmax(logits_BV)
        logs_B = jnp.take_along_axis(logs_BV, tokens_B[:, None], axis=1)[:, 0]
    stopped_B = jnp.any(tokens_B[:, None] == stops_BM, axis=1)
    logs_B, running_B = jnp.where(state.running_B, logs_B, 0.0), state.running_B & ~stopped_B
    return shard(tokens_B), shard(logs_B), shard(running_B)  # every process reads them


def prefill_prompts(
    config: ModelConfig, weights: DecodeWeights, prompts: Sequence[Sequence[int]], cache: Cache
) -> tuple[jax.Array, Cache]:
    """Prefills ragged prompts chunk by chunk; returns the logits [B, V] after each prompt's end.

    The given cache is donated.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths_B.max())
    chunk = min(PREFILL_CHUNK, cache.capacity, 1 << (longest - 1).bit_length())
    padded = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits_BV = jnp.zeros((len(prompts), config.vocab_size), jnp.float32)
    for start in range(0, padded.shape[1], chunk):
        real_B = np.clip(lengths_B - start, 0, chunk).astype(np.int32)
        new_BV, cache = _prefill(config, weights, padded[:, start : start + chunk], real_B, cache)
        logits_BV = new_BV if start == 0 else jnp.where(real_B[:, None] > 0, new_BV, logits_BV)
    return logits_BV, cache
