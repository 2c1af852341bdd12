"""Attention to a cache, in one piece, in blocks, in two segments and in eight bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax import init_cache, prefill, prepare_for_decode
from plt_jax.decoding import attention
from plt_jax.decoding.attention import (
    attend,
    attend_causally,
    attend_gated,
    attend_window,
)
from plt_jax.decoding.quantization import Quantized, quantize
from tests.models import random_params, small_config

H = 4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain(q_BNTH, k_BKSH, v_BKSH, mask_BTS):
    """Softmax over the allowed keys of each query and head, one at a time, in float64."""
    q, k, v, mask = (np.asarray(x, np.float64) for x in (q_BNTH, k_BKSH, v_BKSH, mask_BTS))
    B, N, T, width = q.shape
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(B, N, T):
        head = n // (N // k.shape[1])
        seen = np.flatnonzero(np.broadcast_to(mask, (B, T, k.shape[2]))[b, t])
        logits = k[b, head, seen] @ q[b, n, t] / np.sqrt(width)
        weights = np.exp(logits - logits.max())
        out[b, n, t] = weights @ v[b, head, seen] / weights.sum()
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(1, 1, 1), (4, 2, 1), (4, 2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_few_queries(heads, kv_heads, queries, dtype):
    B, S = 2, 9
    q, k, v = (
        draw(seed, B, n, length, H).astype(dtype)
        for seed, n, length in ((0, heads, queries), (1, kv_heads, S), (2, kv_heads, S))
    )
    mask = np.arange(S) <= np.array([3, 7])[:, None, None]
    out = attend(q, k, v, mask)
    assert out.dtype == dtype and out.shape == q.shape
    tolerance = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(out.astype(jnp.float32), plain(q, k, v, mask), atol=tolerance)


@pytest.mark.slow(reason="compiles a program for every example")
@settings(max_examples=25, derandomize=True)
@given(
    chunk=st.integers(1, 9),
    capacity=st.integers(9, 17),
    query_block=st.integers(1, 5),
    key_block=st.integers(1, 20),
    start=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
def test_blocks_are_the_whole(chunk, capacity, query_block, key_block, start):
    """Whatever the blocks, also where the last one reaches over the end of the cache."""
    positions = np.minimum(np.array(start)[:, None] + np.arange(chunk), capacity - 1)
    q, k, v = draw(0, 2, 4, chunk, H), draw(1, 2, 2, capacity, H), draw(2, 2, 2, capacity, H)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", query_block)
        patch.setattr(attention, "KEY_BLOCK", key_block)
        out = attend_causally(q, k, v, jnp.asarray(positions))
    mask = np.arange(capacity) <= positions[:, :, None]
    np.testing.assert_allclose(out, plain(q, k, v, mask), atol=1e-5)


@settings(max_examples=12, derandomize=True)
@given(
    chunk=st.sampled_from([1, 4, 12]),
    window=st.sampled_from([1, 3, 8]),
    before=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_windows_reach_back_before_the_chunk(chunk, window, before):
    B, total = 2, 20 + 12
    keys, values = draw(1, B, 2, total, H), draw(2, B, 2, total, H)
    past, new = [], []
    for x in (keys, values):
        held = np.full((B, 2, window, H), 1e3, np.float32)
        part = np.zeros((B, 2, chunk, H), np.float32)
        for b, length in enumerate(before):
            for p in range(max(0, length - window), length):
                held[b, :, p - length] = x[b, :, p]
            part[b] = x[b, :, length : length + chunk]
        past.append(jnp.asarray(held))
        new.append(jnp.asarray(part))
    q = draw(0, B, 4, chunk, H)
    exists = np.array(before)[:, None] - window + np.arange(window) >= 0
    out = jax.jit(attend_window)(q, tuple(new), tuple(past), exists)
    distance = (np.array(before)[:, None] + np.arange(chunk))[:, :, None] - np.arange(total)
    mask = (distance >= 0) & (distance < window)
    np.testing.assert_allclose(out, plain(q, keys, values, mask), atol=1e-5)


@settings(max_examples=20, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 4]),
    apart=st.sampled_from([0.0, 1e3, -1e3]),
    platform=st.sampled_from(["cpu", "gpu"]),
    long_cache=st.sampled_from([1, 4096]),
    seed=st.integers(0, 1000),
)
def test_two_segments_are_two_attentions_and_a_gate(rows, apart, platform, long_cache, seed):
    """The logits of one segment may be far below the other's."""
    B, S = 2, 11
    random = np.random.default_rng(seed)
    q, k, v = draw(seed, B, 4, rows, H), draw(seed + 1, B, 2, S, H), draw(seed + 2, B, 2, S, H)
    is_shared = np.arange(S) < 6
    k += apart * jnp.asarray(is_shared)[:, None] * k  # exp() of either segment's would be zero
    seen = random.random((2, B, rows, S)) < 0.7
    shared, window = seen[0] & is_shared, seen[1] & ~is_shared
    shared[..., 0] = window[..., 6] = True
    gate = random.random((B, 4, rows), dtype=np.float32)
    window[:, 0], gate[:, :, 0] = False, 1.0  # loop 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "traced_platform", lambda: platform)
        patch.setattr(attention, "LONG_CACHE", long_cache)
        out = attend_gated(q, k, v, (shared, window), gate, positions=6, windows_at=6)
    right = gate[..., None] * plain(q, k, v, shared)
    if rows > 1:
        later = plain(q[:, :, 1:], k, v, window[:, 1:])
        right[:, :, 1:] += (1 - gate[:, :, 1:, None]) * later
    np.testing.assert_allclose(out, right, atol=1e-5)


# ---- eight bits ----


def test_quantized_numbers_are_within_half_a_step():
    x = draw(3, 2, 3, 5, H) * jnp.array([1e-3, 1.0, 50.0])[None, :, None, None]
    held = quantize(x)
    assert held.values.dtype == jnp.int8 and held.scales.shape == (2, 3, 5, 1)
    assert np.all(np.abs(held.values * held.scales - x) <= 0.501 * held.scales)
    assert np.max(np.abs(held.values)) == 127


def test_zeros_are_quantized_to_zeros():
    held = quantize(jnp.zeros((1, 1, 2, H)))
    assert not np.any(held.values) and not np.any(held.scales)


def test_attention_to_eight_bits_is_that_to_their_numbers():
    """Scales that are applied to logits and weights are as good as applied to every number."""
    q, k, v = draw(0, 2, 4, 3, H), draw(1, 2, 2, 9, H), 3 * draw(2, 2, 2, 9, H)
    held = tuple(map(quantize, (k, v)))
    numbers = [x.values * x.scales for x in held]
    mask = np.arange(9) <= np.array([3, 7])[:, None, None]
    np.testing.assert_allclose(attend(q, *held, mask), plain(q, *numbers, mask), atol=1e-5)
    assert isinstance(held[0], Quantized)


# ---- memory ----


def intermediate_sizes(jaxpr):
    """Numbers of elements of everything that a program makes, nested programs' included."""
    for equation in jaxpr.eqns:
        yield from (np.prod(out.aval.shape) for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from intermediate_sizes(inner)


@pytest.mark.parametrize(("scheme", "count"), [("plt", 2), ("clp", 2), ("no_loop", 1)])
def test_prefill_makes_nothing_of_chunk_times_cache(scheme, count):
    """The logits of one head over a chunk of 4096 tokens would be 16 million numbers."""
    config = small_config(scheme, count, layers=1)
    S = 4096
    params = random_params(config)
    shapes = jax.eval_shape(lambda: (prepare_for_decode(config, params), init_cache(config, 1, S)))
    jaxpr = jax.make_jaxpr(functools.partial(prefill, config))(
        shapes[0],
        jax.ShapeDtypeStruct((1, S), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        shapes[1],
    )
    assert max(intermediate_sizes(jaxpr.jaxpr)) < S * S / 4


def test_prefill_reads_no_more_keys_than_there_are(monkeypatch):
    """Slots after the last position are not read: their contents change nothing."""
    monkeypatch.setattr(attention, "KEY_BLOCK", 4)
    q, k, v = draw(0, 1, 4, 3, H), draw(1, 1, 2, 16, H), draw(2, 1, 2, 16, H)
    positions = jnp.array([[4, 5, 6]])
    right = attend_causally(q, k, v, positions)
    broken = k.at[:, :, 8:].set(np.nan), v.at[:, :, 8:].set(np.nan)
    out = jax.jit(attend_causally)(q, *broken, positions)
    np.testing.assert_allclose(out, right, atol=1e-6)
