"""The state of a fixed number of sequence slots on the device, and the programs that change it.

What requests differ in (positions, sampling, penalties, loops) is data, so that few programs serve
every request. A decode step runs all rows. Those that are free or whose prompt is not complete yet
keep their lengths and carried outputs; the keys that the step writes behind their last position are
overwritten before anything reads them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import Cache, init_cache, shard_cache
from plt_jax.decoding.generation import NOT_FINITE
from plt_jax.decoding.ops import head_logits
from plt_jax.decoding.prefill import last_of_chunk, prefill_outputs
from plt_jax.decoding.sampling import RowSampling, penalize, sample_rows
from plt_jax.decoding.step import step_logits
from plt_jax.distributed.axes import shard

ALTERNATIVES = 20
"""The most likely tokens of which a step gives log-probabilities."""


class SlotState(flax.struct.PyTreeNode):
    """The state of B slots on the device."""

    cache: Cache
    tokens_B: jax.Array
    """int32, the newest token of each slot, which is not in the cache yet."""
    index_B: jax.Array
    """int32, the number of new tokens."""
    keys_B: jax.Array
    """The key of each slot's draws."""
    loops_B: jax.Array
    """int32, after how many loops each slot's logits are taken."""
    sampling: RowSampling
    bias_BV: jax.Array
    """float32, added to the logits."""
    seen_BV: jax.Array
    """bool, the tokens that the prompt or the new text has."""
    counts_BV: jax.Array
    """int32, how often the new text has each token."""


class Drawn(NamedTuple):
    """The tokens that a program drew; all but `tokens_B` are junk if they were not asked for."""

    tokens_B: jax.Array
    """int32; NOT_FINITE where the logits are not finite."""
    logs_B: jax.Array
    """float32, their log-probabilities at temperature 1, with no penalty and no token left out."""
    likeliest_BA: jax.Array
    """int32 [B, A], the most likely tokens, in order."""
    likeliest_logs_BA: jax.Array
    """float32, their log-probabilities."""


class Scores(NamedTuple):
    """Log-probabilities of a chunk's tokens from the second on, and of the one behind it."""

    logs_C: jax.Array
    """float32, of the token that follows each position."""
    likeliest_CA: jax.Array
    """int32, the most likely tokens at each position."""
    likeliest_logs_CA: jax.Array
    """float32."""


class Block(flax.struct.PyTreeNode):
    """What the cache holds of a block of a prompt's tokens, and what goes on behind it."""

    slots: tuple
    """Keys and values of the block's positions, of every layer."""
    windows: tuple
    """The slots behind those of positions: the windows, if there are any."""
    carried: jax.Array
    """The loops' outputs at the block's last position."""


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(
    config: ModelConfig, slots: int, context: int, cache_dtype: str | None
) -> SlotState:
    B, V = slots, config.vocab_size
    none_B, zeros_B, ones_B = jnp.zeros(B, jnp.int32), jnp.zeros(B), jnp.ones(B)
    sampling = RowSampling(
        temperature_B=zeros_B,
        top_k_B=none_B,
        top_p_B=ones_B,
        min_p_B=zeros_B,
        repetition_penalty_B=ones_B,
        presence_penalty_B=zeros_B,
        frequency_penalty_B=zeros_B,
    )
    state = SlotState(
        cache=init_cache(config, B, context, cache_dtype),
        tokens_B=none_B,
        index_B=none_B,
        keys_B=jax.random.split(jax.random.key(0), B),
        loops_B=jnp.full(B, config.loop.count, jnp.int32),
        sampling=sampling,
        bias_BV=jnp.zeros((B, V)),
        seen_BV=jnp.zeros((B, V), bool),
        counts_BV=jnp.zeros((B, V), jnp.int32),
    )
    return placed(state)


def placed(state: SlotState) -> SlotState:
    """The state as all programs take and return it under a mesh: the cache lies as decoding says,
    and every device has the rest."""
    whole = jax.tree.map(shard, state.replace(cache=None))
    return whole.replace(cache=shard_cache(state.cache))


@partial(jax.jit, donate_argnums=0)
def start(state, slot, row, loops, seed, choice, prompt_S, biased, biases) -> SlotState:
    V = state.bias_BV.shape[1]
    cache, key = state.cache, jax.random.fold_in(jax.random.key(seed), choice)
    state = state.replace(
        cache=cache.replace(
            lengths=cache.lengths.at[slot].set(0), carried=cache.carried.at[slot].set(0)
        ),
        index_B=state.index_B.at[slot].set(0),
        keys_B=state.keys_B.at[slot].set(key),
        loops_B=state.loops_B.at[slot].set(loops),
        sampling=state.sampling.replace(
            **{
                name: getattr(state.sampling, name).at[slot].set(value)
                for name, value in row.items()
            }
        ),
        # Tokens of V, beyond the last, fill up the lists, and are dropped.
        bias_BV=state.bias_BV.at[slot].set(jnp.zeros(V).at[biased].set(biases, mode="drop")),
        seen_BV=state.seen_BV.at[slot].set(jnp.zeros(V, bool).at[prompt_S].set(True, mode="drop")),
        counts_BV=state.counts_BV.at[slot].set(0),
    )
    return placed(state)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(config, weights, state, slot, tokens_1C, length, is_last):
    output_1CD, state = _append_chunk(config, weights, state, slot, tokens_1C, length)
    logits_1V = head_logits(weights, last_of_chunk(output_1CD, length[None]))[:, 0]
    return _draw_first(state, slot, logits_1V, is_last)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_scored(config, weights, state, slot, tokens_1C, length, is_last, following_1C):
    output_1CD, state = _append_chunk(config, weights, state, slot, tokens_1C, length)
    logs_1CV = jax.nn.log_softmax(head_logits(weights, output_1CD))
    likeliest_logs, likeliest = jax.lax.top_k(logs_1CV[0], min(ALTERNATIVES, config.vocab_size))
    logs_1C = jnp.take_along_axis(logs_1CV, following_1C[:, :, None], axis=2)[:, :, 0]
    logits_1V = head_logits(weights, last_of_chunk(output_1CD, length[None]))[:, 0]
    state, drawn = _draw_first(state, slot, logits_1V, is_last)
    return state, drawn, Scores(logs_1C[0], likeliest.astype(jnp.int32), likeliest_logs)


def _append_chunk(config, weights, state, slot, tokens_1C, length):
    """What the head reads behind each token of a chunk [1, C, D], and the state after it."""
    row = _row_of(state.cache, slot)
    output_1CD, row = prefill_outputs(
        config, weights, tokens_1C, length[None], row, state.loops_B[slot][None]
    )
    return output_1CD, state.replace(cache=_with_row(state.cache, slot, row))


def _draw_first(state: SlotState, slot, logits_1V, is_last) -> tuple[SlotState, Drawn]:
    """Draws a slot's first new token; the state keeps it if the prompt `is_last`."""
    drawn = _draw(
        jax.tree.map(lambda all_B: all_B[slot][None], _draw_inputs(state)), logits_1V, True
    )
    token = drawn.tokens_B[0]
    new = is_last.astype(jnp.int32)
    at = jnp.maximum(token, 0)
    state = state.replace(
        tokens_B=state.tokens_B.at[slot].set(token),
        index_B=state.index_B.at[slot].set(new),
        seen_BV=state.seen_BV.at[slot, at].max(is_last),
        counts_BV=state.counts_BV.at[slot, at].add(new),
    )
    return placed(state), drawn


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def step(
    config, longest: int, weights, state, active_B, log_probabilities
) -> tuple[SlotState, Drawn]:
    before = state.cache
    logits_BV, cache = step_logits(
        config, weights, jnp.maximum(state.tokens_B, 0), before, state.loops_B, longest
    )
    cache = cache.replace(
        lengths=jnp.where(active_B, cache.lengths, before.lengths),
        carried=jnp.where(active_B[:, None, None], cache.carried, before.carried),
    )
    drawn = _draw(_draw_inputs(state), logits_BV, log_probabilities)
    rows = jnp.arange(active_B.shape[0])
    at_B = jnp.maximum(drawn.tokens_B, 0)
    state = state.replace(
        cache=cache,
        tokens_B=jnp.where(active_B, drawn.tokens_B, state.tokens_B),
        index_B=state.index_B + active_B,
        seen_BV=state.seen_BV.at[rows, at_B].max(active_B),
        counts_BV=state.counts_BV.at[rows, at_B].add(active_B.astype(jnp.int32)),
    )
    return placed(state), drawn


class _DrawInputs(NamedTuple):
    """What the draws of some slots depend on, beside logits; see `SlotState`."""

    index_B: jax.Array
    keys_B: jax.Array
    sampling: RowSampling
    bias_BV: jax.Array
    seen_BV: jax.Array
    counts_BV: jax.Array


def _draw_inputs(state: SlotState) -> _DrawInputs:
    return _DrawInputs(*(getattr(state, name) for name in _DrawInputs._fields))


def _draw(inputs: _DrawInputs, logits_BV: jax.Array, log_probabilities) -> Drawn:
    rows = inputs.sampling
    is_penalized = (
        (rows.repetition_penalty_B != 1)
        | (rows.presence_penalty_B != 0)
        | (rows.frequency_penalty_B != 0)
        | jnp.any(inputs.bias_BV != 0, axis=1)
    )

    def changed() -> jax.Array:
        return penalize(logits_BV, rows, inputs.seen_BV, inputs.counts_BV) + inputs.bias_BV

    chosen_BV = jax.lax.cond(jnp.any(is_penalized), changed, lambda: logits_BV)
    keys_B = jax.vmap(jax.random.fold_in)(inputs.keys_B, inputs.index_B)
    drawn_B = sample_rows(chosen_BV, rows, keys_B)
    logit_B = jnp.take_along_axis(logits_BV, drawn_B[:, None], axis=1)[:, 0]
    tokens_B = jnp.where(jnp.isfinite(logit_B), drawn_B, NOT_FINITE)
    B, V = logits_BV.shape
    A = min(ALTERNATIVES, V)

    def logs() -> tuple[jax.Array, jax.Array, jax.Array]:
        logs_BV = jax.nn.log_softmax(logits_BV)
        likeliest_logs_BA, likeliest_BA = jax.lax.top_k(logs_BV, A)
        logs_B = jnp.take_along_axis(logs_BV, drawn_B[:, None], axis=1)[:, 0]
        return logs_B, likeliest_BA.astype(jnp.int32), likeliest_logs_BA

    def none() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros(B), jnp.zeros((B, A), jnp.int32), jnp.zeros((B, A))

    return Drawn(tokens_B, *jax.lax.cond(log_probabilities, logs, none))


def _row_of(cache: Cache, slot: jax.Array) -> Cache:
    """One sequence of a cache."""
    return jax.tree.map(lambda all_B: jax.lax.dynamic_slice_in_dim(all_B, slot, 1), cache)


def _with_row(cache: Cache, slot: jax.Array, row: Cache) -> Cache:
    return jax.tree.map(
        lambda all_B, one: jax.lax.dynamic_update_slice_in_dim(all_B, one, slot, 0), cache, row
    )


@partial(jax.jit, static_argnums=0)
def save_block(chunk: int, cache: Cache, slot: jax.Array, start: jax.Array) -> Block:
    capacity = cache.capacity

    def cut(all_BKSH: jax.Array, begin: jax.Array | int, size: int) -> jax.Array:
        _, K, _, H = all_BKSH.shape
        return jax.lax.dynamic_slice(all_BKSH, (slot, 0, begin, 0), (1, K, size, H))

    arrays = cache.keys, cache.values
    return Block(
        jax.tree.map(lambda array: cut(array, start, chunk), arrays),
        jax.tree.map(lambda array: cut(array, capacity, array.shape[2] - capacity), arrays),
        jax.lax.dynamic_slice_in_dim(cache.carried, slot, 1),
    )


@partial(jax.jit, donate_argnums=0)
def load_block(state: SlotState, slot: jax.Array, start: jax.Array, block: Block) -> SlotState:
    cache = state.cache

    def put(begin):
        def update(all_BKSH: jax.Array, piece: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(all_BKSH, piece, (slot, 0, begin, 0))

        return update

    arrays = jax.tree.map(put(start), (cache.keys, cache.values), block.slots)
    keys, values = jax.tree.map(put(cache.capacity), arrays, block.windows)
    chunk = jax.tree.leaves(block.slots)[0].shape[2]
    cache = cache.replace(
        keys=keys,
        values=values,
        lengths=cache.lengths.at[slot].set(start + chunk),
        carried=jax.lax.dynamic_update_slice_in_dim(cache.carried, block.carried, slot, 0),
    )
    return placed(state.replace(cache=cache))
