"""Weights in eight bits: what they hold, and that decoding with them is decoding with what they
stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax import InputError, decode_step, init_cache, prefill, prepare_for_decode
from plt_jax.config import MoEConfig
from plt_jax.decoding.linear import _converted_product, linear
from plt_jax.decoding.quantization import (
    Quantized,
    dequantize_params,
    is_quantized,
    quantize,
    quantize_params,
)
from tests.models import forward, random_params, random_tokens, small_config

SHAPES = st.sampled_from([(3, 5), (2, 3, 5), (2, 4, 3, 5)])
TIED = {"tied_embeddings": True}
quantized = jax.jit(quantize, static_argnums=1)
MIXTURE = {
    "moe": MoEConfig(
        experts=4, dense_layers=1, experts_per_token=2, expert_width=8, shared_width=8
    ),
}


@settings(max_examples=40, derandomize=True)
@given(shape=SHAPES, axes=st.sampled_from([-1, -2, (-1, -2)]), seed=st.integers(0, 99))
def test_numbers_are_within_half_a_step(shape, axes, seed):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    held = quantized(jnp.asarray(x), axes)
    largest = np.abs(x).max(axis=axes, keepdims=True)
    np.testing.assert_allclose(held.scales, largest / 127, rtol=1e-6)
    assert held.values.dtype == jnp.int8
    error = np.abs(np.asarray(held.dequantized(jnp.float32)) - x)
    assert np.all(error <= largest / 254 * (1 + 1e-5))


def test_rounding_what_was_rounded_changes_nothing():
    """So a run in eight bits can be read into float32, and rounded again."""
    x = jax.random.normal(jax.random.key(0), (64, 48))
    held = quantize(x)
    again = quantize(held.dequantized(jnp.float32))
    np.testing.assert_array_equal(again.values, held.values)
    np.testing.assert_allclose(again.scales, held.scales, rtol=1e-6)


def test_zeros_stay_zeros():
    held = quantize(jnp.zeros((2, 3)))
    assert not np.any(held.dequantized(jnp.float32))


@settings(max_examples=40, derandomize=True)
@given(
    rows=st.sampled_from([(1,), (1, 1), (2,), (3, 1), (2, 3), (17,)]),
    outputs=st.sampled_from([(1,), (7,), (2, 5)]),
    inputs=st.sampled_from([1, 2, 7, 16, 40]),  # each is compiled
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_a_product_is_that_of_the_numbers_it_stands_for(rows, outputs, inputs, dtype, seed):
    random = np.random.default_rng(seed)
    x = jnp.asarray(
        random.normal(size=(*rows, inputs)) * 10 ** random.normal(size=(*rows, 1)), dtype
    )
    weight = quantized(jnp.asarray(random.normal(size=(*outputs, inputs)), jnp.float32))
    out = jax.jit(linear)(x, weight)
    assert out.dtype == jnp.float32
    whole = np.asarray(weight.values, np.float64) * np.asarray(weight.scales, np.float64)
    right = np.tensordot(np.asarray(x, np.float64), whole, axes=(-1, -1))
    # Half a step of the low half, for each input, times the largest weight.
    step = np.abs(np.asarray(x, np.float64)).max(-1) / 127 / 254
    bound = step * 0.5 * np.abs(whole).sum(-1).max() + 1e-5 * np.abs(right).max()
    error = np.abs(out - right).reshape(*rows, -1).max(-1)
    assert np.all(error <= bound)


def test_other_platforms_convert_the_weight():
    """GPUs and TPUs do so while they read it; what they compute is the same."""
    x = jax.random.normal(jax.random.key(0), (3, 64))
    weight = quantize(jax.random.normal(jax.random.key(1), (32, 64)))
    np.testing.assert_allclose(_converted_product(x, weight), linear(x, weight), atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_do_not_become_finite(bad):
    weight = quantize(jnp.ones((4, 8)).at[1, 2].set(bad))
    assert not np.isfinite(linear(jnp.ones((1, 8)), weight)[0, 1])
    x = jnp.ones((2, 8)).at[1, 3].set(bad)
    out = linear(x, quantize(jnp.ones((4, 8))))
    assert np.all(np.isfinite(out[0])) and not np.any(np.isfinite(out[1]))


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("plt", {}), ("plt", TIED), ("no_loop", {}), ("vanilla_loop", TIED), ("plt", MIXTURE)],
    ids=str,
)
def test_decoding_is_the_forward_pass_of_what_the_weights_stand_for(scheme, settings):
    config = small_config(scheme, 1 if scheme == "no_loop" else 2, **settings)
    params = random_params(config)
    rounded = quantize_params(params)
    tokens = random_tokens(config, 2, 12)
    expected = forward(config)(dequantize_params(rounded), tokens)
    weights = prepare_for_decode(config, params, "int8")
    logits, cache = jax.jit(prefill, static_argnums=0)(
        config, weights, tokens[:, :7], jnp.array([7, 7]), init_cache(config, 2, 16)
    )
    np.testing.assert_allclose(logits, expected[:, 6], atol=2e-3)
    step = jax.jit(decode_step, static_argnums=0)
    for at in range(7, 12):
        logits, cache = step(config, weights, tokens[:, at], cache)
        np.testing.assert_allclose(logits, expected[:, at], atol=2e-3)
    # The rounding itself is no error that this tolerance would hide.
    exact = forward(config)(params, tokens)
    assert np.abs(exact - expected).max() > 1e-2


def test_rounded_parameters_and_rounding_at_the_layout_are_the_same():
    config = small_config("plt", 2, **MIXTURE)
    params = random_params(config)
    once = prepare_for_decode(config, quantize_params(params))
    jax.tree.map(np.testing.assert_array_equal, once, prepare_for_decode(config, params, "int8"))


def test_which_weights_are_rounded():
    config = small_config("plt", 2, **MIXTURE)
    rounded = quantize_params(random_params(config))
    names = {
        name
        for part in ("dense_layers", "layers")
        for name, leaf in rounded[part].items()
        if is_quantized(leaf)
    }
    assert names == {
        *("q", "k", "v", "o", "ffn_gate", "ffn_up", "ffn_down"),
        *("shared_gate_proj", "shared_up", "shared_down"),
        *("expert_gate", "expert_up", "expert_down"),
    }
    assert is_quantized(rounded["head"]) and not is_quantized(rounded["embedding"])
    # One scale for each output, in every layer.
    layers, width, heads, head_width = rounded["layers"]["q"].shape
    assert rounded["layers"]["q"].scales.shape == (layers, 1, heads, head_width)
    assert rounded["layers"]["o"].scales.shape == (layers, 1, 1, width)


def test_a_tied_embedding_is_rounded_by_token():
    rounded = quantize_params(random_params(small_config("plt", 2, **TIED)))
    assert isinstance(rounded["embedding"], Quantized)
    assert rounded["embedding"].scales.shape == (rounded["embedding"].shape[0], 1)


def test_weights_that_are_laid_out_cannot_be_rounded_any_more():
    config = small_config()
    wide, rounded = (prepare_for_decode(config, random_params(config), to) for to in (None, "int8"))
    with pytest.raises(InputError, match="laid out in float32 already"):
        prepare_for_decode(config, wide, "int8")
    assert prepare_for_decode(config, rounded, "int8") is rounded


def test_an_unknown_dtype_is_refused():
    config = small_config()
    with pytest.raises(InputError, match="asked for in int3; it must be int8"):
        prepare_for_decode(config, random_params(config), "int3")
