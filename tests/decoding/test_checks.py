"""What the functions of decoding refuse, and that they do so before any device work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import InputError, decode_step, init_cache, prefill
from plt_jax.decoding import prefill as prefill_module
from plt_jax.decoding import step as step_module
from tests.models import random_params, small_config

CONFIG = small_config("plt", 2)
CAPACITY = 8


@pytest.fixture
def cache():
    return init_cache(CONFIG, 2, CAPACITY).replace(lengths=jnp.array([3, 7]))


@pytest.fixture(autouse=True)
def no_device_work(monkeypatch):
    def device_work(*_):
        raise AssertionError("device work began")

    monkeypatch.setattr(prefill_module, "_prefill", device_work)
    monkeypatch.setattr(step_module, "_decode_step", device_work)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (np.zeros((3, 4)), [1, 1, 1], "do not match a cache of 2 sequences"),
        (np.zeros(2), [1, 1], r"tokens must have shape \(batch, chunk\), got \(2,\)"),
        (np.zeros((2, 9)), [1, 1], "a chunk of 9 tokens does not fit a cache of 8"),
        (np.zeros((2, 0)), [0, 0], "a chunk of 0 tokens"),
        (np.zeros((2, 4)), [1], r"lengths must have shape \(2,\), got \(1,\)"),
        (np.zeros((2, 4)), [5, 1], r"lengths\[0\] is 5; it must be 0 to 4"),
        (np.zeros((2, 4)), [1, -1], r"lengths\[1\] is -1"),
        (np.zeros((2, 4)), [4, 2], "sequence 1 holds 7 tokens and is given 2 more.*room for 8"),
        (np.full((2, 4), 31), [1, 1], "tokens holds token 31, outside the vocabulary of 31"),
        (np.full((2, 4), -1), [1, 0], "tokens holds token -1"),
    ],
)
def test_a_chunk_that_cannot_be_appended_is_refused(cache, tokens, lengths, message):
    with pytest.raises(InputError, match=message):
        prefill(CONFIG, random_params(CONFIG), tokens.astype(int), np.array(lengths), cache)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 0, 0], "do not match a cache of 2 sequences"),
        ([[0, 0]], r"tokens must have shape \(batch,\), got \(1, 2\)"),
        ([0, 31], "tokens holds token 31, outside the vocabulary of 31"),
        ([0.5, 1.5], "tokens must hold whole numbers, got float"),
    ],
)
def test_a_token_that_cannot_be_appended_is_refused(cache, tokens, message):
    with pytest.raises(InputError, match=message):
        decode_step(CONFIG, random_params(CONFIG), np.array(tokens), cache)


def test_a_full_cache_is_refused(cache):
    full = cache.replace(lengths=jnp.array([3, CAPACITY]))
    with pytest.raises(InputError, match="sequence 1 holds 8 tokens and is given 1 more"):
        decode_step(CONFIG, random_params(CONFIG), jnp.zeros(2, int), full)


@pytest.mark.parametrize("row", [0, 1])
def test_what_is_not_real_is_not_looked_at(cache, row, monkeypatch):
    """Padding may hold anything."""
    reached = []
    monkeypatch.setattr(prefill_module, "_prefill", lambda *inputs: reached.append(inputs))
    tokens = np.zeros((2, 4), int)
    tokens[row, 1:] = 1000
    prefill(CONFIG, random_params(CONFIG), tokens, np.array([1, 1]), cache)
    assert len(reached) == 1


def test_inside_jit_shapes_alone_are_known(cache, monkeypatch):
    monkeypatch.setattr(step_module, "_decode_step", lambda config, params, tokens, cache: tokens)
    step = jax.jit(functools.partial(decode_step, CONFIG))
    assert step(random_params(CONFIG), jnp.array([0, 99]), cache).tolist() == [0, 99]
    with pytest.raises(InputError, match="do not match a cache of 2 sequences"):
        step(random_params(CONFIG), jnp.zeros(3, int), cache)


@pytest.mark.parametrize("dtype", ["float16", "int4", "int32", "nonsense"])
def test_cache_of_another_dtype_is_refused(dtype):
    with pytest.raises(InputError, match=f"cache dtype is {dtype}; it must be one of float32"):
        init_cache(CONFIG, 2, 8, dtype)
