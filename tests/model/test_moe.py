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
    weights_of_loop,
)
from tests import reference
from tests.models import (
    forward,
    forward_with_states,
    random_params,
    random_tokens,
    small_config,
)

VARIANTS = {
    "leading dense layer": {"dense_layers": 1},
    "ragged_dot": {"grouped_product": "ragged_dot"},
    "biases": {"bias_update_rate": 0.1, "renormalize": False},
    "softmax first": {"routing": "softmax_then_topk", "renormalize": False},
    "renormalised": {"routing": "softmax_then_topk", "renormalize": True},
    "top-k first": {"routing": "topk_then_softmax"},
    "shared expert": {"shared_width": 12},
    "gated shared expert": {"shared_width": 12, "shared_gate": True},
    "one expert a token": {"experts_per_token": 1, "renormalize": False},
}


def moe_config(**moe):
    return small_config(
        count=2,
        layers=2 if moe.get("dense_layers") else 1,
        moe={"experts": 5, "experts_per_token": 2, "expert_width": 8, **moe},
    )


@pytest.mark.slow(reason="compiles several programs")
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


@pytest.mark.slow(reason="compiles several programs")
def test_decoding_gives_the_forward_logits():
    config = moe_config(shared_width=12, shared_gate=True)
    params, tokens = random_params(config), random_tokens(config, 2, 10)
    expected = forward(config)(params, tokens)
    cache = init_cache(config, 2, 16)
    logits, cache = prefill(config, params, tokens[:, :6], jnp.array([6, 6]), cache)
    for position in range(6, 10):
        np.testing.assert_allclose(logits, expected[:, position - 1], atol=1e-4)
        logits, cache = decode_step(config, params, tokens[:, position], cache)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-4)


@pytest.mark.slow(reason="compiles several programs")
def test_one_expert_taking_all_tokens_and_empty_experts_are_exact():
    config = moe_config(experts_per_token=1, renormalize=True)
    weights = {name: leaf[0] for name, leaf in random_params(config)["layers"].items()}
    weights["router"] = jnp.zeros_like(weights["router"]).at[:, 3].set(1.0)
    x_BTD = jnp.abs(jax.random.normal(jax.random.key(0), (2, 7, config.width)))
    out, statistics = mixture_of_experts(config.moe, weights, x_BTD)
    expert = (weights[name][3] for name in ("expert_gate", "expert_up", "expert_down"))
    np.testing.assert_allclose(out, reference.swiglu(x_BTD, *expert), atol=1e-5)
    grads, expected = (
        jax.jit(jax.grad(lambda weights, run=run: jnp.sum(jnp.sin(run(weights)))))(weights)
        for run in (
            lambda weights: mixture_of_experts(config.moe, weights, x_BTD)[0],
            lambda weights: reference.mixture_of_experts(config.moe, weights, x_BTD),
        )
    )
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4), grads, expected
    )
    for name in ("expert_gate", "expert_up", "expert_down"):
        assert not grads[name][:3].any()
        assert grads[name][3].any()
    np.testing.assert_array_equal(statistics.load_X, [0, 0, 0, 1, 0])
    assert load_entropy(statistics.load_X) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow(reason="compiles several programs")
def test_statistics_have_one_entry_for_every_loop_and_layer():
    config = moe_config()
    params, tokens = random_params(config), random_tokens(config, 2, 12)
    router = forward_with_states(config)(params, tokens)[1].router
    assert router.load_X.shape == (2, 1, 5)
    np.testing.assert_allclose(router.load_X.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(router.probability_X.sum(-1), 1.0, rtol=1e-6)
    assert len(np.unique(np.asarray(router.squared_log_z))) == 2


def test_products_of_routers_are_not_rounded_on_accelerators():
    config = moe_config(shared_width=12, shared_gate=True)
    weights = {name: leaf[0] for name, leaf in random_params(config)["layers"].items()}
    x_BTD = jnp.zeros((1, 2, config.width), jnp.bfloat16)
    with jax.default_matmul_precision("default"):
        jaxpr = jax.make_jaxpr(lambda x: mixture_of_experts(config.moe, weights, x))(x_BTD)
    exact = [
        equation.outvars[0].aval.shape[-1]
        for equation in jaxpr.eqns
        if equation.primitive.name == "dot_general"
        and equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    ]
    assert exact == [5, 1]  # the router's experts, and the shared expert's gate


def test_biases_choose_and_do_not_weigh():
    """A bias that is large enough decides who is chosen; weights are those of the logits alone."""
    config = moe_config(bias_update_rate=0.1, routing="topk_then_softmax")
    weights = {name: leaf[0] for name, leaf in random_params(config)["layers"].items()}
    weights["router_bias"] = jnp.zeros((2, 5)).at[0, 1].set(99.0).at[1, 4].set(99.0)
    x_BTD = jax.random.normal(jax.random.key(0), (2, 3, config.width))
    logits_MX = (x_BTD @ weights["router"]).reshape(6, 5)
    for loop, favoured in ((0, 1), (1, 4)):
        routing = route(config.moe, weights_of_loop(weights, loop), x_BTD)
        np.testing.assert_array_equal(routing.chosen_Mk[:, 0], favoured)
        others_MX = logits_MX.at[:, favoured].set(-jnp.inf)
        np.testing.assert_array_equal(routing.chosen_Mk[:, 1], others_MX.argmax(-1))
        chosen_Mk = jnp.take_along_axis(logits_MX, routing.chosen_Mk, axis=1)
        np.testing.assert_allclose(routing.weight_Mk, jax.nn.softmax(chosen_Mk), rtol=1e-5)
    # One loop a position, as a decode step has its rows.
    rows = route(config.moe, weights_of_loop(weights, jnp.array([0, 1, 0])), x_BTD)
    np.testing.assert_array_equal(rows.chosen_Mk[:, 0].reshape(2, 3), [[1, 4, 1]] * 2)


def test_losses_are_what_their_definitions_say():
    statistics = RouterStatistics(
        load_X=jnp.array([[0.75, 0.25]]),
        dropped=jnp.zeros(1),
        chosen_BTk=None,
        probability_X=jnp.array([[0.6, 0.4]]),
        squared_log_z=jnp.array([3.0]),
    )
    moe = MoEConfig(experts=2, load_balance_loss=0.5, router_z_loss=0.1)
    balance = 2 * (0.75 * 0.6 + 0.25 * 0.4)
    assert auxiliary_loss(moe, [statistics]) == pytest.approx(0.5 * balance + 0.1 * 3.0)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    assert load_entropy(statistics.load_X) == pytest.approx([entropy], rel=1e-6)


def test_the_router_is_float32_whatever_the_inputs_are():
    moe = MoEConfig(experts=4, experts_per_token=2)
    x_BTD = jax.random.normal(jax.random.key(0), (2, 3, 8), jnp.bfloat16)
    weights = {"router": jax.random.normal(jax.random.key(1), (8, 4))}
    routing = route(moe, weights, x_BTD)
    exact = route(moe, weights, x_BTD.astype(jnp.float32))
    assert routing.weight_Mk.dtype == jnp.float32
    np.testing.assert_array_equal(routing.weight_Mk, exact.weight_Mk)
