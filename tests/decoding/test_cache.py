"""The cache's size, the parameters' layouts, and what is refused."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import Transformer, decode_step, init_cache, prefill, prepare_for_decode
from plt_jax.decoding import cache as caches
from plt_jax.decoding.cache import slots_for
from plt_jax.decoding.prefill import kept_in_window
from plt_jax.decoding.step import UnpreparedWeightsWarning
from tests.models import ALL, random_params, small_config

B, S, W, D = 3, 40, 5, 16


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("scheme", "count"), ALL)
def test_size(scheme, count):
    """The table of the paper: K/V times L without sharing, W/S of it more per loop with windows."""
    plain = init_cache(small_config("no_loop", 1), B, S)
    cache = init_cache(small_config(scheme, count, window=W), B, S)
    keys_values = size((plain.keys, plain.values))
    assert keys_values == 2 * 2 * B * S * 2 * 4 * 4  # k and v, layers, B, S, heads, width, bytes
    assert size(plain) == keys_values + 4 * B

    later, windows, full = count - 1, 0, 1
    if scheme in ("vanilla_loop", "clp"):
        full = count
    elif scheme in ("plt", "loop_kv_share_window"):
        windows = later
    carried = later if scheme in ("clp", "clp_kv_share", "plt") else 0
    assert cache.carried.shape == (B, carried, D)
    expected = keys_values * full + keys_values * windows * W // S + 4 * B * carried * D + 4 * B
    assert size(cache) == expected
    assert cache.capacity == S
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(cache))


def test_dtype():
    config = small_config("plt", 2, dtype="bfloat16")
    for cache, dtype in (
        (init_cache(config, B, S), jnp.bfloat16),
        (init_cache(config, B, S, "float32"), jnp.float32),
    ):
        arrays = jax.tree.leaves(cache.replace(lengths=None))
        assert {array.dtype for array in arrays} == {jnp.dtype(dtype)}
        assert cache.lengths.dtype == jnp.int32


@pytest.mark.parametrize("window", [1, 3, 7, 50])
def test_slots(window):
    """Loop 1's keys lie at their positions; a later loop's at position mod W of its window."""
    slots, _ = slots_for(small_config("plt", 3, window=window), B, 10)
    assert slots == (10, min(window, 10), 10 + 2 * min(window, 10))
    positions = np.arange(12)
    np.testing.assert_array_equal(slots.of(0, positions), [*range(10), slots.count, slots.count])
    for loop in (1, 2):
        first = 10 + (loop - 1) * slots.window
        np.testing.assert_array_equal(slots.of(loop, positions), first + positions % slots.window)


@pytest.mark.parametrize("window", [1, 3, 64, 65, 5000])
@pytest.mark.parametrize("length", [1, 1024, 1056])
def test_slots_on_a_gpu_need_no_padding(monkeypatch, window, length):
    monkeypatch.setattr(caches, "traced_platform", lambda: "gpu")
    slots, _ = slots_for(small_config("plt", 3, window=window), B, length)
    assert slots.count % caches.GPU_SLOTS == 0
    assert slots.capacity >= length and slots.window == min(window, slots.capacity)
    assert slots.capacity - length < caches.GPU_SLOTS


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_chunk_writes_each_slot_of_a_window_once(window):
    """Which of two writes to one slot stays is not defined, though a CPU keeps the last."""
    before, lengths = jnp.array([0, 2, 5, 11]), jnp.array([10, 10, 1, 0])
    positions = before[:, None] + jnp.arange(10)
    kept = kept_in_window(window, positions, lengths, before)
    for row, of_row, length in zip(np.asarray(kept), np.asarray(positions), lengths, strict=True):
        written = of_row[row] % window
        assert len(set(written.tolist())) == len(written) == min(window, length)


@pytest.mark.slow(reason="compiles several programs")
def test_raw_boxed_and_prepared_params_answer_alike():
    config = small_config("no_loop", 1)
    tokens, lengths, cache = jnp.ones((2, 3), int), jnp.array([3, 2]), init_cache(config, 2, 8)

    @jax.jit
    def answer(params):
        logits, filled = prefill(config, params, tokens, lengths, cache)
        return logits, *decode_step(config, params, tokens[:, 0], filled)

    boxed = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"]
    assert isinstance(boxed["head"], nn.Partitioned)
    prepared = answer(prepare_for_decode(config, boxed))
    for params in (boxed, nn.unbox(boxed)):
        jax.tree.map(
            lambda actual, right: np.testing.assert_allclose(actual, right, atol=1e-6),
            answer(params),
            prepared,
        )


@pytest.mark.slow(reason="compiles several programs")
def test_a_step_that_lays_weights_out_says_so_once():
    config = small_config()
    params, cache = random_params(config), init_cache(config, 1, 4)
    tokens = jnp.zeros(1, jnp.int32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            _, cache = decode_step(config, params, tokens, cache)
        decode_step(config, prepare_for_decode(config, params), tokens, cache)
    (warning,) = [one for one in caught if one.category is UnpreparedWeightsWarning]
    assert "prepare_for_decode(config, params) once" in str(warning.message)
    assert warning.filename == __file__


def test_preparing_happens_once():
    prepared = prepare_for_decode(small_config(), random_params(small_config()))
    assert prepare_for_decode(small_config(), prepared) is prepared


@pytest.mark.parametrize("tied", [False, True])
def test_prepared_weights(tied):
    """Each key/value head lies behind its queries; norms and gates stay float32."""
    config = small_config("plt", 2, dtype="bfloat16", tied_embeddings=tied)
    params = random_params(config)
    prepared = prepare_for_decode(config, params)
    assert (prepared.head is None) is tied
    D, K, G, H = 16, 2, 2, 4
    for j, layer in enumerate(prepared.layers):
        own = {name: np.asarray(stacked[j]) for name, stacked in params["layers"].items()}
        qkv = np.asarray(layer["qkv"], np.float32).reshape(K, G + 2, H, D)
        for head in range(K):
            for row, right in enumerate(
                [
                    own["q"][:, head * G],
                    own["q"][:, head * G + 1],
                    own["k"][:, head],
                    own["v"][:, head],
                ]
            ):
                np.testing.assert_array_equal(qkv[head, row], rounded(right.T))
        np.testing.assert_array_equal(layer["o"], rounded(own["o"].reshape(-1, D).T))
        both = np.stack([own["ffn_gate"].T, own["ffn_up"].T])
        np.testing.assert_array_equal(layer["gate_up"], rounded(both))
        np.testing.assert_array_equal(layer["down"], rounded(own["ffn_down"].T))
        kept = (layer.keys() & own.keys()) - {"o"}
        assert kept == {"attention_norm", "ffn_norm", "gate_bias", "gate_weight"}
        for name in kept:
            np.testing.assert_array_equal(layer[name], own[name])


def rounded(x):
    return jnp.asarray(x, jnp.bfloat16)


def test_router_stays_in_float32():
    """As in the forward pass, or decoding would choose other experts."""
    config = small_config(dtype="bfloat16", moe={"experts": 4, "expert_width": 8})
    params = random_params(config)
    for j, layer in enumerate(prepare_for_decode(config, params).layers):
        np.testing.assert_array_equal(layer["router"], params["layers"]["router"][j])
        assert layer["expert_gate_up"].dtype == layer["expert_down"].dtype == jnp.bfloat16


# ---- what is refused ----


@pytest.mark.parametrize(("batch", "length"), [(0, 8), (2, 0), (-1, 8)])
def test_empty_cache_is_refused(batch, length):
    with pytest.raises(ValueError, match=rf"at least 1, got {batch}, {length}"):
        init_cache(small_config(), batch, length)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_writing_row_by_row_is_writing_at_once(monkeypatch, dtype):
    """As TPUs write a few slots of each sequence; what is beyond the end is dropped there too."""
    B, K, S, H = 4, 2, 5, 3
    random = np.random.default_rng(0)
    held = jnp.asarray(random.normal(size=(B, K, S, H)), jnp.float32)
    stored = caches.quantize(held) if dtype == "int8" else held
    new = jnp.asarray(random.normal(size=(B, K, 2, H)), jnp.float32)
    slots = jnp.array([[0, 1], [4, 2], [5, 0], [9, 9]])
    expected = caches.write(stored, new, slots)
    monkeypatch.setattr(caches, "traced_platform", lambda: "tpu")
    jax.tree.map(np.testing.assert_array_equal, caches.write(stored, new, slots), expected)
    assert not np.array_equal(jax.tree.leaves(expected)[0], jax.tree.leaves(stored)[0])


def test_a_window_wider_than_the_cache_takes_no_more_than_the_cache():
    cache = init_cache(small_config("plt", window=2**31 - 1), 2, 24)
    assert {array.shape for array in jax.tree.leaves(cache.keys)} == {(2, 2, 48, 4)}
