"""The decode step's work: one pass of the stack for all loops, one read of the shared cache.

What is looked at is the form for accelerators; that for CPUs, which tests run, differs in how it
multiplies rows, not in which.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from plt_jax import decode_step, init_cache, prepare_for_decode
from tests.models import ALL, random_params, small_config

B, S, LAYERS = 3, 40, 2
SHIFTED = ("no_loop", "clp", "clp_kv_share", "plt")


def equations(jaxpr, loops: bool = False) -> Iterator:
    """All equations of a jaxpr, with those of nested ones; no loop hides repetitions of any.

    Args:
      loops: whether there may be loops all the same.
    """
    for equation in jaxpr.eqns:
        assert loops or equation.primitive.name not in ("scan", "while")
        yield equation
        if equation.primitive.name == "cond":  # a choice by platform: one of them runs
            yield from equations(equation.params["branches"][-1].jaxpr, loops)
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, loops)


@functools.cache
def products(scheme: str, count: int) -> list[list[tuple[int, ...]]]:
    """The shapes of both operands of every matrix product of a decode step."""
    config = small_config(scheme, count)
    params = prepare_for_decode(config, random_params(config))
    jaxpr = jax.make_jaxpr(functools.partial(decode_step, config))(
        params, jnp.zeros(B, jnp.int32), init_cache(config, B, S)
    )
    return [
        [operand.aval.shape for operand in equation.invars]
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    ]


def count_with(shape, scheme, count):
    return sum(shape in operands for operands in products(scheme, count))


@pytest.mark.parametrize(("scheme", "count"), ALL)
def test_weights_are_read_once_for_all_loops(scheme, count):
    """Each weight is in one product a layer; L in the schemes without a shift."""
    passes = 1 if scheme in SHIFTED else count
    weights = {"gate and up": (48, 16), "down": (16, 24), "q, k and v": (32, 16), "o": (16, 16)}
    read = {name: count_with(shape, scheme, count) for name, shape in weights.items()}
    assert read == dict.fromkeys(weights, LAYERS * passes)


@pytest.mark.parametrize(("scheme", "count"), ALL)
def test_all_slots_are_read_once_for_all_loops(scheme, count):
    """Once for the logits and once for the sum of values, in every layer."""
    config = small_config(scheme, count)
    windows = (count - 1) * config.loop.window if config.loop.later_attention == "gated" else 0
    shared = (B, 2, S + windows, 4)
    own_caches = count if scheme in ("clp", "vanilla_loop") else 1
    passes = count if scheme == "loop_kv_share_window" else 1
    assert count_with(shared, scheme, count) == 2 * LAYERS * passes * own_caches


@pytest.mark.parametrize(("scheme", "count"), ALL)
def test_head_reads_the_last_loop_alone(scheme, count):
    head = [operands for operands in products(scheme, count) if (31, 16) in operands]
    assert head == [[(B, 16), (31, 16)]]


@pytest.mark.parametrize(("batch", "grouped"), [(1, False), (32, False), (33, True)])
def test_few_rows_are_not_sorted_by_expert(batch, grouped):
    """Two rows a sequence: up to 64 are few."""
    config = small_config("plt", 2, moe={"experts": 8, "experts_per_token": 2, "expert_width": 8})
    params = prepare_for_decode(config, random_params(config))
    cache, tokens = init_cache(config, batch, S), jnp.zeros(batch, jnp.int32)
    jaxpr = jax.make_jaxpr(functools.partial(decode_step, config))(params, tokens, cache)
    names = {equation.primitive.name for equation in equations(jaxpr.jaxpr, loops=True)}
    assert ("sort" in names) == grouped
