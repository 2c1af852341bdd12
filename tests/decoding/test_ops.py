"""Products with prepared weights are the plain ones, in whichever form the backend is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.config import MoEConfig
from plt_jax.decoding import ops
from plt_jax.decoding.linear import linear
from plt_jax.decoding.ops import few_experts, many_experts


@settings(max_examples=40, derandomize=True)
@given(
    rows=st.sampled_from([(1,), (1, 1), (2,), (3, 1), (2, 3), (1, 4), (17,)]),
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_linear_is_a_product_summed_in_float32(rows, outputs, inputs, dtype, seed):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(*rows, inputs)), dtype)
    weight = jnp.asarray(random.normal(size=(outputs, inputs)), dtype)
    out = linear(x, weight)
    assert out.dtype == jnp.float32
    right = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(out, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [256, 257])
def test_linear_of_many_rows(rows):
    random = np.random.default_rng(rows)
    x, weight = random.normal(size=(rows, 3)), random.normal(size=(5, 3))
    out = jax.jit(linear)(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(out, x @ weight.T, atol=1e-5, rtol=1e-5)


def test_a_weight_that_is_used_twice_is_not_copied():
    """As the passes of a vanilla loop use it. A copy for every row took them twice the time."""
    x, weight = jnp.ones((4, 64)), jnp.ones((64, 64))
    twice = jax.jit(lambda x, weight: linear(jnp.tanh(linear(x, weight)), weight))
    temporaries = twice.lower(x, weight).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < weight.nbytes


@pytest.mark.slow(reason="compiles a mixture of experts for every case")
@pytest.mark.parametrize(
    ("tokens", "chosen", "held"),
    [(1, 2, 4), (1, 2, 3), (1, 4, 1), (3, 1, 4), (3, 4, 2), (70, 2, 4), (70, 3, 2)],
)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_prepared_experts_are_the_declared_ones(monkeypatch, platform, tokens, chosen, held):
    """Few rows and many, with some of the experts elsewhere."""
    monkeypatch.setattr(ops, "traced_platform", lambda: platform)
    X, D, F = 4, 6, 5
    random = np.random.default_rng(tokens + chosen)
    gate, up, down = (random.normal(size=shape) for shape in ((X, D, F), (X, D, F), (X, F, D)))
    x, weight = random.normal(size=(tokens, D)), random.uniform(size=(tokens, chosen))
    which = np.stack([random.permutation(X)[:chosen] for _ in range(tokens)])
    which[0, 0] = X - 1  # elsewhere, if any is
    which[0, 1:] = np.arange(chosen - 1)
    expected = np.zeros((tokens, D))
    for token, choice in np.ndindex(which.shape):
        expert = which[token, choice]
        if expert < held:
            into = x[token] @ gate[expert]
            made = (into / (1 + np.exp(-into)) * (x[token] @ up[expert])) @ down[expert]
            expected[token] += weight[token, choice] * made
    prepared = {
        "expert_gate_up": np.stack([gate.swapaxes(1, 2), up.swapaxes(1, 2)], axis=1)[:held],
        "expert_down": down.swapaxes(1, 2)[:held],
    }
    inputs = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), (prepared, x, weight))
    moe = MoEConfig(experts=X, experts_per_token=chosen, expert_width=F)
    for run in (few_experts, functools.partial(many_experts, moe)):
        out = jax.jit(functools.partial(run))(*inputs, jnp.minimum(which, held))
        np.testing.assert_allclose(out, expected, atol=1e-4)
