"""Early exit: decode steps that stop their loops where a rule says that a token needs no more.

Only schemes without a shift can save time by it: they run their loops one after another, and the
step ends when no sequence of the batch needs another loop. (With a shift all loops are one pass.)

A token has no keys and values of the loops that it did not run. Later tokens, which may run them,
read those of its last loop there. So a token's loops, logits and cache depend on its own sequence
alone, not on the rest of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import Cache, LayerCache, Stored, write
from plt_jax.decoding.ops import Norms, head_logits
from plt_jax.decoding.weights import DecodeWeights
from plt_jax.distributed.axes import mesh_is_active
from plt_jax.errors import InputError
from plt_jax.model.looping import loop_output
from plt_jax.model.moe import float32_product

KINDS = ("kl", "entropy", "gate")


class ExitRule(flax.struct.PyTreeNode):
    """When a token runs no further loop. The threshold is data: rules of one kind compile once.

    kl: the first loop whose prediction is less than the threshold, in nats (KL), from the loop
    before. entropy: the first loop whose prediction has an entropy below it, in nats. gate: the
    first loop by which the exit gate's probability to have exited is at least the threshold.
    """

    kind: str = flax.struct.field(pytree_node=False)
    threshold: float | jax.Array

    def __str__(self) -> str:
        return f"{self.kind}:{self.threshold:g}"


def parse_rule(word: str, model: ModelConfig) -> ExitRule:
    """The rule that `kl:NUMBER`, `entropy:NUMBER`, `gate:NUMBER` or `gate` names.

    Raises:
      InputError: it is unknown or has no number, the model has no exit gate, or has one loop.
    """
    kind, _, number = word.strip().partition(":")
    if kind == "gate" and not number:
        number = str(model.loop.exit_threshold)
    try:
        rule = ExitRule(kind, float(number))
    except ValueError:
        rule = ExitRule(kind, math.nan)
    _check_kind(model, rule, f"--exit {word.strip()!r}")
    return rule


def _check_kind(model: ModelConfig, rule: ExitRule, shown: str) -> None:
    """Raises InputError unless the rule can be told from what the model computes.

    Args:
      shown: the rule, as the message calls it.
    """
    if rule.kind not in KINDS or not rule.threshold > 0.0:
        raise InputError(
            f"{shown} is no rule; give kl:NUMBER, entropy:NUMBER or gate[:NUMBER], with a number "
            "above 0"
        )
    if rule.kind == "gate" and not model.loop.exit_gate:
        raise InputError(f"{shown} needs a model with an exit gate (model.loop.exit_gate)")
    if model.loop.count == 1:
        raise InputError(f"{shown} needs loops to exit from, but {model.loop.scheme} runs one")


def check_rule(config: ModelConfig, rule: ExitRule) -> None:
    """Raises InputError unless decode steps of the model can end by the rule."""
    _check_kind(config, rule, f"the exit rule {rule}")
    if config.loop.shifted:
        raise InputError(
            f"{config.loop.scheme} decodes all loops in one pass, so that no loop can be left out; "
            "decode it without an exit rule, or with fewer loops"
        )
    if mesh_is_active():
        raise InputError(
            "loops end early on one device alone; leave out the exit rule, or the mesh"
        )
    if rule.kind == "kl" and config.loop.count == 2:
        raise InputError(
            f"the exit rule {rule} compares two loops' predictions, and the model has no third "
            "loop to leave out; use entropy or gate"
        )
    if rule.kind != "gate" and config.has_coda:
        raise InputError(
            f"the exit rule {rule} reads a prediction after every loop, but this model's "
            "predictions need the layers behind the loops; use its gate, if it has one"
        )


RunCore = Callable[[range, jax.Array, Cache], tuple[jax.Array, Cache]]
"""Runs the looped layers over one row for each loop of a range; see step.py."""


class _State(NamedTuple):
    """What a loop hands to the next one."""

    hidden_B1D: jax.Array
    """The hidden state of each sequence's last loop."""
    exited_B: jax.Array
    """bool, the sequences that run no further loop."""
    loops_B: jax.Array
    """int32, the loops that they have run."""
    judged: jax.Array
    """What the rule has read: the logits [B, V] behind each sequence's last loop, or, of the gate,
    the probability [B] of not having exited."""
    cache: Cache


def run_until_exit(
    config: ModelConfig,
    weights: DecodeWeights,
    rule: ExitRule,
    norms: Norms,
    run_core: RunCore,
    first_B1D: jax.Array,
    cache: Cache,
    running_B: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array, Cache]:
    """Runs loops until the rule holds for all sequences.

    Args:
      first_B1D: what loop 1 reads.
      running_B: bool, the sequences that matter; no loop runs for the others alone.

    Returns:
      The hidden states of each sequence's last loop [B, 1, D], the logits behind it [B, V] if the
      rule reads them, the number of its loops, int32 [B], and the cache.
    """
    loop = config.loop
    judge = partial(_judge, weights, rule, norms)
    hidden_B1D, cache = run_core(range(1), first_B1D, cache)
    holds_B, judged = judge(hidden_B1D, None)
    loops_B = jnp.ones(holds_B.shape, jnp.int32)
    state = _State(hidden_B1D, holds_B | ~running_B, loops_B, judged, cache)

    def run(index: int, state: _State) -> _State:
        x_B1D = loop_output(loop, state.hidden_B1D, norms.between_loops)
        new_B1D, cache = run_core(range(index, index + 1), x_B1D, state.cache)
        holds_B, judged = judge(new_B1D, state.judged)
        kept = partial(_where, state.exited_B)
        return _State(
            kept(state.hidden_B1D, new_B1D),
            state.exited_B | holds_B,
            state.loops_B + ~state.exited_B,
            kept(state.judged, judged),
            _repeat_loop(config, cache, index, state.exited_B),
        )

    def skip(index: int, state: _State) -> _State:
        everyone_B = jnp.ones_like(state.exited_B)
        return state._replace(cache=_repeat_loop(config, state.cache, index, everyone_B))

    for index in range(1, loop.count):
        ended = jnp.all(state.exited_B)
        state = jax.lax.cond(ended, partial(skip, index), partial(run, index), state)
    logits_BV = None if rule.kind == "gate" else state.judged
    return state.hidden_B1D, logits_BV, state.loops_B, state.cache


def _judge(
    weights: DecodeWeights,
    rule: ExitRule,
    norms: Norms,
    hidden_B1D: jax.Array,
    before: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Whether the rule holds after a loop, bool [B], and what it has read, see `_State.judged`.

    Args:
      hidden_B1D: the loop's hidden state.
      before: what it has read after the loop before; None after loop 1.
    """
    if rule.kind == "gate":
        assert weights.exit_gate is not None and weights.exit_gate_bias is not None
        score_B11 = float32_product(norms.between_loops(hidden_B1D), weights.exit_gate)
        stays_B = 1.0 - jax.nn.sigmoid(score_B11 + weights.exit_gate_bias)[:, 0, 0]
        stays_B = stays_B if before is None else before * stays_B
        return 1.0 - stays_B >= rule.threshold, stays_B
    logits_BV = head_logits(weights, norms.final(hidden_B1D))[:, 0]
    logs_BV = jax.nn.log_softmax(logits_BV)
    if rule.kind == "entropy":
        nats_B = -jnp.sum(jnp.exp(logs_BV) * logs_BV, axis=-1)
    elif before is None:
        nats_B = jnp.full(len(logs_BV), jnp.inf)
    else:
        nats_B = jnp.sum(jnp.exp(logs_BV) * (logs_BV - jax.nn.log_softmax(before)), axis=-1)
    return nats_B < rule.threshold, logits_BV


def _where(rows_B: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """The rows of one array where `rows_B` holds, and of another where it does not."""
    return jnp.where(rows_B.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _repeat_loop(config: ModelConfig, cache: Cache, index: int, rows_B: jax.Array) -> Cache:
    """Gives the newest position of some sequences the keys and values that it has of the loop
    before `index`, as those of loop `index`, too."""
    slots, layers = cache.slots, cache.layers()
    own = config.loop.later_attention == "own"
    position_B1 = jnp.minimum(cache.lengths, slots.capacity - 1)[:, None]
    source, target = (index - 1, index) if own else (0, 0)
    from_B1, to_B1 = (slots.of(0 if own else one, position_B1) for one in (index - 1, index))

    def repeated(stored: tuple[Stored, ...]) -> tuple[Stored, ...]:
        def of_array(old: jax.Array, new: jax.Array) -> Stored:
            rows = jnp.arange(len(rows_B))[:, None]
            taken = _where(rows_B, new[rows, :, from_B1], old[rows, :, to_B1])
            return write(old, taken.swapaxes(1, 2), to_B1, all_exist=True)

        changed = jax.tree.map(of_array, stored[target], stored[source])
        return (*stored[:target], changed, *stored[target + 1 :])

    for j in config.layers_in("core"):
        layers[j] = LayerCache(repeated(layers[j].keys), repeated(layers[j].values))
    return cache.with_layers(layers)
