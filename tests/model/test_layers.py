"""The small pieces against their formulas, written out with numpy."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.model import layers
from plt_jax.model.layers import (
    embed,
    logits_from,
    multiplies_rows,
    rms_norm,
    rope_rotation,
    rotate,
    silu_times,
    swiglu,
)
from plt_jax.model.looping import shift_states
from plt_jax.model.loss import cross_entropy
from plt_jax.model.transformer import number_documents, positions_in_documents
from tests.models import small_config

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_rms_norm():
    x, scale = normal(2, 3, 8), normal(8)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(rms_norm(x, scale, 0.5), expected, atol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    """Rounded once, at the end."""
    x = jnp.asarray(normal(4, 256) * 100, jnp.bfloat16)
    normed = rms_norm(x, jnp.ones(256), 1e-5)
    assert normed.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float32)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_array_equal(normed, np.asarray(expected, jnp.bfloat16))


def test_swiglu():
    x, gate, up, down = normal(2, 3, 4), normal(4, 5), normal(4, 5), normal(5, 4)
    gated = x @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    np.testing.assert_allclose(swiglu(x, gate, up, down), expected, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rope_turns_pairs_by_position_times_frequency(monkeypatch, platform):
    monkeypatch.setattr(layers, "traced_platform", lambda: platform)
    x = normal(1, 2, 3, 6)
    positions = np.array([[0, 1, 1000]])
    config = small_config(head_width=6, rope_theta=100.0)
    turned = np.asarray(rotate(x, rope_rotation(config, positions)))
    for t, position in enumerate(positions[0]):
        for pair in range(3):
            pairs = x[0, :, t, pair] + 1j * x[0, :, t, pair + 3]
            pairs = pairs * np.exp(1j * position * 100.0 ** (-pair / 3))
            np.testing.assert_allclose(turned[0, :, t, pair], pairs.real, atol=2e-4)
            np.testing.assert_allclose(turned[0, :, t, pair + 3], pairs.imag, atol=2e-4)


def test_gradients_of_frequent_tokens_are_summed_in_float32():
    tokens = jnp.zeros((4, 500), jnp.int32)
    table = jnp.ones((3, 2))
    gradient = jax.grad(lambda table: jnp.sum(embed(tokens, table, jnp.bfloat16), dtype=float))
    np.testing.assert_array_equal(gradient(table)[0], [2000, 2000])


def test_logits_by_head_and_by_embedding():
    x, embedding, head = normal(2, 3, 4), normal(7, 4), normal(4, 7)
    np.testing.assert_allclose(logits_from(x, embedding, head), x @ head, atol=1e-5)
    np.testing.assert_allclose(logits_from(x, embedding, None), x @ embedding.T, atol=1e-5)
    assert logits_from(x.astype(jnp.bfloat16), embedding, head).dtype == jnp.float32


def test_cross_entropy():
    logits, targets = normal(2, 3, 5), RNG.integers(0, 5, (2, 3))
    loss, log_z = cross_entropy(logits, targets)
    expected = np.log(np.sum(np.exp(logits), axis=-1))
    np.testing.assert_allclose(log_z, expected, atol=1e-6)
    for index in np.ndindex(2, 3):
        chosen = logits[(*index, targets[index])]
        np.testing.assert_allclose(loss[index], expected[index] - chosen, atol=1e-6)


@settings(max_examples=15, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=12, max_size=12))
def test_documents_are_runs_of_equal_ids(runs):
    ids = np.array([name for name, length in runs for _ in range(length)][:12])
    numbers, positions = [0], [0]
    for before, after in itertools.pairwise(ids):
        numbers.append(numbers[-1] + (before != after))
        positions.append(0 if before != after else positions[-1] + 1)
    documents = number_documents(jnp.asarray(ids[None]))
    np.testing.assert_array_equal(documents, [numbers])
    np.testing.assert_array_equal(positions_in_documents(documents), [positions])

    states = normal(1, 12, 3)
    shifted = shift_states(states, documents)
    for i, position in enumerate(positions):
        expected = states[0, i - 1] if position else np.zeros(3)
        np.testing.assert_array_equal(shifted[0, i], expected)


def test_shift_of_one_document():
    states = normal(2, 4, 3)
    shifted = np.asarray(shift_states(states, None))
    np.testing.assert_array_equal(shifted[:, 1:], states[:, :-1])
    np.testing.assert_array_equal(shifted[:, 0], np.zeros((2, 3)))


# ---- Backward passes that are written here, against JAX's own ----


def plain_rms_norm(x, scale, epsilon):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide / jnp.sqrt(mean + epsilon) * scale).astype(x.dtype)


def check_gradients(function, plain, *inputs, rtol):
    weights = jax.random.normal(jax.random.key(9), jax.eval_shape(plain, *inputs).shape)

    def weighted(function):
        return lambda *x: jnp.sum(weights * function(*x).astype(jnp.float32))

    arguments = tuple(range(len(inputs)))
    found, expected = (
        jax.grad(weighted(one), argnums=arguments)(*inputs) for one in (function, plain)
    )
    for one, other, x in zip(found, expected, inputs, strict=True):
        assert (one.dtype, one.shape) == (x.dtype, x.shape)
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 6)])
def test_the_norms_gradients(shape, dtype, rtol):
    x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    scale = 1 + jax.random.normal(jax.random.key(1), shape[-1:])
    check_gradients(
        lambda x, scale: rms_norm(x, scale, 0.1),
        lambda x, scale: plain_rms_norm(x, scale, 0.1),
        *(x, scale),
        rtol=rtol,
    )


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_the_gradients_of_silu_times(dtype, rtol):
    gate, up = (
        3 * jax.random.normal(jax.random.key(seed), (4, 9)).astype(dtype) for seed in (0, 1)
    )
    check_gradients(silu_times, lambda gate, up: jax.nn.silu(gate) * up, gate, up, rtol=rtol)


@pytest.mark.parametrize(("sizes", "rows"), [((4, 1), True), ((2, 2), False)])
def test_products_of_rows_gather_no_sequence_that_devices_share(sizes, rows):
    mesh = jax.sharding.AbstractMesh(
        sizes, ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules((("length", "context"),)):
        assert multiplies_rows() == (rows and jax.default_backend() == "cpu")
