"""Products with prepared weights are the plain ones, in whichever form the backend is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.config import MoEConfig
from plt_jax.decoding.layout import linear
from plt_jax.model.moe import apply_experts, gather_experts


@settings(max_examples=40, deadline=None, derandomize=True)
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


@settings(max_examples=15, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 5), chosen=st.integers(1, 4), seed=st.integers(0, 99))
def test_gathered_experts_are_the_grouped_ones(tokens, chosen, seed):
    X, D, F = 4, 6, 5
    random = np.random.default_rng(seed)
    moe = MoEConfig(experts=X, experts_per_token=chosen, expert_width=F)
    weights = {
        "expert_gate": random.normal(size=(X, D, F)),
        "expert_up": random.normal(size=(X, D, F)),
        "expert_down": random.normal(size=(X, F, D)),
    }
    weights = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), weights)
    x = jnp.asarray(random.normal(size=(tokens, D)), jnp.float32)
    share = jnp.asarray(random.uniform(size=(tokens, moe.experts_per_token)), jnp.float32)
    which = np.stack([random.permutation(X)[:chosen] for _ in range(tokens)])
    inputs = (weights, x, share, jnp.asarray(which, jnp.int32))
    np.testing.assert_allclose(gather_experts(*inputs), apply_experts(*inputs), atol=1e-5)
