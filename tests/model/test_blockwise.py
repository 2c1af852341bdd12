"""Blockwise attention against one query at a time, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax.model.blockwise import causal_attention, masked_attention, windowed_attention

B, N, K, H = 2, 4, 2, 6
LENGTHS = (1, 5, 64, 65, 200, 300)
"""On both sides of MIN_BLOCK = 64, of one block and of several, full and not."""

WINDOWS = {
    1: (1, 64),
    5: (1, 2, 500),
    64: (2, 64, 65),
    65: (64, 65, 100),
    200: (1, 2, 64, 65, 100, 500),
    300: (64, 65, 66, 100, 500),
}
CASES = [(length, None) for length in LENGTHS] + [
    (length, window) for length in LENGTHS for window in WINDOWS[length]
]


def random_inputs(length):
    """Queries [B, N, T, H], keys and values [B, K, T, H], not small: attention is uneven."""
    rng = np.random.default_rng(length)
    return tuple(
        rng.normal(scale=2.0, size=(B, heads, length, H)).astype(np.float32) for heads in (N, K, K)
    )


def random_documents(length):
    """Numbers 0, 1, ... of documents [B, T], of which some are one token long."""
    starts = np.random.default_rng(length + 1).random((B, length)) < 0.06
    starts[:, length // 2 : length // 2 + 2] = True
    starts[:, 0] = False
    return np.cumsum(starts, axis=1).astype(np.int32)


def attention(window):
    """The attention under test, `(q, k, v, documents) -> out`; causal without a window."""
    if window is None:
        return causal_attention
    return functools.partial(windowed_attention, window=window)


def one_query_at_a_time(q, k, v, documents, window):
    """Attention with loops over sequences, heads and queries, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, n, t in np.ndindex(out.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        seen = np.arange(first, t + 1)
        if documents is not None:
            seen = seen[documents[b, seen] == documents[b, t]]
        scores = k[b, n // (N // K), seen] @ q[b, n, t] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, n, t] = weights @ v[b, n // (N // K), seen] / weights.sum()
    return out


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(("length", "window"), CASES)
def test_blocks_are_one_query_at_a_time(length, window, packed):
    q, k, v = random_inputs(length)
    documents = random_documents(length) if packed else None
    out = jax.jit(attention(window))(q, k, v, documents)
    expected = one_query_at_a_time(q, k, v, documents, window)
    np.testing.assert_allclose(out, expected, atol=2e-5)


def dense(q, k, v, documents, window):
    """Attention by one [T, T] mask and jax.nn.softmax."""
    index = jnp.arange(q.shape[2])
    distance = index[:, None] - index
    mask = (distance >= 0) & (distance < (window or len(index)))
    mask = mask & (documents[:, :, None] == documents[:, None, :])
    k, v = jnp.repeat(k, N // K, axis=1), jnp.repeat(v, N // K, axis=1)
    scores = jnp.where(mask[:, None], q @ k.swapaxes(2, 3) / np.sqrt(H), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1) @ v


@pytest.mark.parametrize("window", [None, 65])
def test_gradients_are_those_of_dense_attention(window):
    inputs, documents = random_inputs(200), random_documents(200)
    weights = np.random.default_rng(0).normal(size=inputs[0].shape).astype(np.float32)

    def gradients(function):
        return jax.jit(jax.grad(lambda inputs: jnp.sum(weights * function(*inputs))))(inputs)

    actual = gradients(lambda q, k, v: attention(window)(q, k, v, documents))
    expected = gradients(lambda q, k, v: dense(q, k, v, documents, window))
    for gradient, right in zip(actual, expected, strict=True):
        assert np.all(np.isfinite(gradient))
        np.testing.assert_allclose(gradient, right, atol=1e-4)


@pytest.mark.parametrize("window", [None, 65])
def test_equal_and_huge_logits_have_finite_gradients(window):
    """No softmax overflows, and a row with one key alone is no division by zero."""
    _, _, v = random_inputs(65)
    documents = np.broadcast_to(np.arange(65, dtype=np.int32), (B, 65))
    q, k = np.full((B, N, 65, H), 1e4, np.float32), np.full((B, K, 65, H), 1e4, np.float32)

    @jax.jit
    def out_and_gradients(q, k, v, documents):
        out, pullback = jax.vjp(lambda *x: attention(window)(*x, documents), q, k, v)
        return out, *pullback(jnp.ones_like(out))

    for numbers in (documents, documents // 7):
        assert all(np.all(np.isfinite(x)) for x in out_and_gradients(q, k, v, numbers))


def test_softmax_of_bfloat16_is_in_float32():
    """Only the inputs and the output are rounded: to 8 bits, also where logits are large."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_inputs(65))
    q = 3 * q
    for window in (None, 64):
        out = jax.jit(attention(window))(q, k, v, None)
        assert out.dtype == jnp.bfloat16
        expected = one_query_at_a_time(q, k, v, None, window)
        np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.04)


def costs(function, length):
    """Floating-point operations and bytes of temporary memory of the compiled program."""
    q, k = jnp.zeros((1, 2, length, 8)), jnp.zeros((1, 1, length, 8))
    program = jax.jit(function).lower(q, k, k, None).compile()
    return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes


def growth_from_1024_to_4096(function):
    """By what factors the work and the temporary memory of a compiled program grow."""
    return np.divide(costs(function, 4096), costs(function, 1024))


def test_windowed_attention_is_linear_in_the_length():
    work, memory = growth_from_1024_to_4096(functools.partial(windowed_attention, window=64))
    assert work < 4.5 and memory < 4.5


def test_causal_attention_is_not():
    work, memory = growth_from_1024_to_4096(causal_attention)
    assert work > 12 and memory > 8


def test_causal_attention_skips_most_of_what_it_may_not_see():
    """7/16 of all products at best with 8 blocks."""

    def all_products(q, k, v, _):
        return masked_attention(q, k, v, jnp.ones((1, 1, k.shape[2]), bool))

    assert costs(causal_attention, 2048)[0] < 0.65 * costs(all_products, 2048)[0]
