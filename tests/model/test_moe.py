"""Mixture-of-experts layers against the reference, which runs every expert on every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import Transformer, decode_step, init_cache, prefill
from plt_jax.config import MoEConfig
from plt_jax.model.moe import (
    RouterStatistics,
    auxiliary_loss,
    load_entropy,
    mixture_of_experts,
    route,
)
from tests import reference
from tests.models import random_params, random_tokens, small_config

VARIANTS = {
    "softmax first": {"routing": "softmax_then_topk", "renormalize": False},
    "renormalised": {"routing": "softmax_then_topk", "renormalize": True},
    "top-k first": {"routing": "topk_then_softmax"},
    "shared expert": {"shared_width": 12},
    "gated shared expert": {"shared_width": 12, "shared_gate": True},
    "one expert a token": {"experts_per_token": 1, "renormalize": False},
}


def moe_config(**moe):
    return small_config(
        count=2, layers=1, moe={"experts": 5, "experts_per_token": 2, "expert_width": 8, **moe}
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_the_reference(variant):
    config = moe_config(**VARIANTS[variant])
    params, tokens = random_params(config), random_tokens(config, 2, 12)

    def ours(params):
        logits = Transformer(config).apply({"params": params}, tokens)
        return jnp.sum(jnp.sin(logits)), logits

    def theirs(params):
        logits = reference.forward(config, params, tokens)["logits"]
        return jnp.sum(jnp.sin(logits)), logits

    (grads, logits), (expected, expected_logits) = (
        jax.jit(jax.grad(f, has_aux=True))(params) for f in (ours, theirs)
    )
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(
            got, want, atol=1e-4 * (1 + np.abs(want).max())
        ),
        grads,
        expected,
    )


def test_decoding_gives_the_forward_logits():
    config = moe_config(shared_width=12, shared_gate=True)
    params, tokens = random_params(config), random_tokens(config, 2, 10)
    expected = Transformer(config).apply({"params": params}, tokens)
    cache = init_cache(config, 2, 16)
    logits, cache = prefill(config, params, tokens[:, :6], jnp.array([6, 6]), cache)
    for position in range(6, 10):
        np.testing.assert_allclose(logits, expected[:, position - 1], atol=1e-4)
        logits, cache = decode_step(config, params, tokens[:, position], cache)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-4)


def test_one_expert_taking_all_tokens_and_empty_experts_are_exact():
    config = moe_config(experts_per_token=1, renormalize=True)
    weights = {name: leaf[0] for name, leaf in random_params(config)["layers"].items()}
    weights["router"] = jnp.zeros_like(weights["router"]).at[:, 3].set(1.0)
    x_BTD = jnp.abs(jax.random.normal(jax.random.key(0), (2, 7, config.width)))
    out, statistics = mixture_of_experts(config.moe, weights, x_BTD)
    expert = (weights[name][3] for name in ("expert_gate", "expert_up", "expert_down"))
    np.testing.assert_allclose(out, reference.swiglu(x_BTD, *expert), atol=1e-5)
    np.testing.assert_array_equal(statistics.load_X, [0, 0, 0, 1, 0])
    assert load_entropy(statistics) == pytest.approx(0.0, abs=1e-6)


def test_statistics_have_one_entry_for_every_loop_and_layer():
    config = moe_config()
    params, tokens = random_params(config), random_tokens(config, 2, 12)
    router = Transformer(config).apply({"params": params}, tokens, method="loop_states").router
    assert router.load_X.shape == (2, 1, 5)
    np.testing.assert_allclose(router.load_X.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(router.probability_X.sum(-1), 1.0, rtol=1e-6)
    assert len(np.unique(np.asarray(router.squared_log_z))) == 2


def test_losses_are_what_their_definitions_say():
    statistics = RouterStatistics(
        load_X=jnp.array([[0.75, 0.25]]),
        probability_X=jnp.array([[0.6, 0.4]]),
        squared_log_z=jnp.array([3.0]),
    )
    moe = MoEConfig(experts=2, load_balance_loss=0.5, router_z_loss=0.1)
    balance = 2 * (0.75 * 0.6 + 0.25 * 0.4)
    assert auxiliary_loss(moe, statistics) == pytest.approx(0.5 * balance + 0.1 * 3.0)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    assert load_entropy(statistics) == pytest.approx(entropy, rel=1e-6)


def test_the_router_is_float32_whatever_the_inputs_are():
    moe = MoEConfig(experts=4, experts_per_token=2)
    x_MD = jax.random.normal(jax.random.key(0), (6, 8), jnp.bfloat16)
    router_DX = jax.random.normal(jax.random.key(1), (8, 4))
    weight_Mk, _, statistics = route(moe, router_DX, x_MD)
    exact, _, _ = route(moe, router_DX, x_MD.astype(jnp.float32))
    assert weight_Mk.dtype == jnp.float32
    np.testing.assert_array_equal(weight_Mk, exact)
    assert statistics.load_X.dtype == jnp.float32
