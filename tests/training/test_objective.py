"""Losses at every loop, against the same of all logits by JAX's own gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from flax.linen import unbox

from plt_jax import InputError, Transformer
from plt_jax.config import RunConfig
from plt_jax.config.variants import Variant
from plt_jax.model.arithmetic import train_flops
from plt_jax.model.looping import with_loops
from plt_jax.model.loss import cross_entropy
from plt_jax.training import objective
from tests.models import random_params, small_config
from tests.tiers import slow_but
from tests.training.test_step import close, make_batch, make_config

MODELS = {
    "plt": small_config("plt", 3, window=3, layers=1, exit_gate=True),
    "of the middle": small_config("clp", 2, layers=3, first_layer=1, last_layer=1, exit_gate=True),
}
BATCH = make_batch()


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config, params, step=0):
    (loss, sums), gradients = jax.value_and_grad(
        lambda params: objective.batch_loss(config, params, BATCH, step), has_aux=True
    )(params)
    return loss, sums, gradients


@functools.partial(jax.jit, static_argnums=0)
def nats_by_loop(model, params):
    """Each target's negative log-likelihood if each loop is the last, [L, B, T], and the exit
    probabilities as the paper has them."""

    def forward(module):
        states = module.loop_states(BATCH["tokens"], BATCH["segment_ids"])
        logits = module.logits_by_loop(BATCH["tokens"], BATCH["segment_ids"])
        normed = module.normalize_loop(states.hidden_LBTD)
        return logits, jax.nn.sigmoid(normed @ params["exit_gate"] + params["exit_gate_bias"])

    logits, leaves = Transformer(model).apply({"params": params}, method=forward)
    exits, stays = [], 1.0
    for leave in leaves[:-1, ..., 0]:
        exits.append(stays * leave)
        stays = stays * (1 - leave)
    nats = jnp.stack([cross_entropy(one, BATCH["targets"])[0] for one in logits])
    return nats, jnp.stack([*exits, stays])


CASES = slow_but(["plt"], MODELS, "compiles another model")


@pytest.mark.parametrize("name", CASES)
def test_weighted_losses_of_all_loops(name):
    model, params = MODELS[name], random_params(MODELS[name])
    weights = [0.3, 0.7][: model.loop.count - 1]
    config = make_config(model, training={"loop_losses": weights})

    def expected(params):
        nats = nats_by_loop(model, params)[0]
        return sum(
            weight * jnp.sum(one * BATCH["weights"])
            for weight, one in zip([*weights, 1.0], nats, strict=True)
        )

    loss, sums, gradients = loss_and_gradients(config, params)
    right, right_gradients = jax.jit(jax.value_and_grad(expected))(params)
    assert float(loss) == pytest.approx(float(right), rel=1e-5)
    close(gradients, right_gradients, rtol=1e-4, atol=1e-4)
    nats = jnp.sum(nats_by_loop(model, params)[0] * BATCH["weights"], axis=(1, 2))
    np.testing.assert_allclose(sums["loss_by_loop"], nats, rtol=1e-5)
    assert float(sums["loss"]) == float(sums["loss_by_loop"][-1])


@pytest.mark.parametrize("name", CASES)
def test_the_expected_loss_over_exits_and_their_entropy(name):
    model, params = MODELS[name], random_params(MODELS[name])
    config = make_config(model, training={"exit_entropy": 0.2})

    def expected(params):
        nats, exits = nats_by_loop(model, params)
        entropy = -jnp.sum(exits * jnp.log(exits), axis=0)
        return jnp.sum((jnp.sum(nats * exits, axis=0) - 0.2 * entropy) * BATCH["weights"])

    loss, sums, gradients = loss_and_gradients(config, params)
    right, right_gradients = jax.jit(jax.value_and_grad(expected))(params)
    assert float(loss) == pytest.approx(float(right), rel=1e-5)
    close(gradients, right_gradients, rtol=1e-4, atol=1e-4)
    assert np.abs(gradients["exit_gate"]).max() > 1e-2
    assert float(jnp.sum(sums["exit_by_loop"])) == pytest.approx(BATCH["weights"].sum(), rel=1e-5)


def test_a_gate_that_never_exits_is_the_last_loops_loss_and_is_finite():
    model = MODELS["plt"]
    params = random_params(model) | {"exit_gate_bias": jnp.array([-200.0])}
    loss, _, gradients = loss_and_gradients(
        make_config(model, training={"exit_entropy": 0.2}), params
    )
    plain, _, _ = loss_and_gradients(make_config(model), params)
    assert float(loss) == pytest.approx(float(plain), rel=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_weights_of_zero_are_the_last_loops_loss():
    model, params = MODELS["plt"], random_params(MODELS["plt"])
    off = loss_and_gradients(make_config(model), params)
    zero = loss_and_gradients(make_config(model, training={"loop_losses": [0.0, 0.0]}), params)
    assert float(off[0]) == float(zero[0]) and "loss_by_loop" not in off[1]
    close(off[2], zero[2], rtol=1e-5, atol=3e-6)  # of two programs


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_drawn_loop_is_that_of_a_model_with_so_many(name):
    model, params = MODELS[name], random_params(MODELS[name])
    for count in range(1, model.loop.count + 1):
        shares = [float(number == count) for number in range(1, model.loop.count + 1)]
        config = make_config(model, training={"loop_counts": shares})
        loss, sums, gradients = loss_and_gradients(config, params)
        fewer = make_config(with_loops(model, params, count)[0])
        right, _, right_gradients = loss_and_gradients(fewer, params)
        assert float(loss) == pytest.approx(float(right), rel=1e-6)
        close(gradients, right_gradients, rtol=1e-4, atol=1e-5)
        assert float(sums["loops"]) == count * BATCH["weights"].sum()


def test_loops_are_drawn_by_their_shares_the_same_for_a_step():
    config = make_config(MODELS["plt"], training={"loop_counts": [1.0, 0.0, 3.0]})
    drawn = jax.vmap(lambda step: objective.drawn_loops(config, step))(jnp.arange(2000))
    assert set(np.asarray(drawn).tolist()) == {1, 3}
    assert np.mean(np.asarray(drawn) == 3) == pytest.approx(0.75, abs=0.03)
    other = make_config(MODELS["plt"], seed=1, training={"loop_counts": [1.0, 0.0, 3.0]})
    again = [int(objective.drawn_loops(config, step)) for step in range(20)]
    assert again == drawn[:20].tolist()
    assert again != [int(objective.drawn_loops(other, step)) for step in range(20)]


def test_hidden_scale_grows_from_zero_to_its_value():
    model = small_config("plt", 2, window=3, layers=1, hidden_scale=0.8)
    params = random_params(model)
    config = make_config(model, training={"hidden_scale_warmup": 0.5})  # of 50 steps

    def loss_with(scale):
        loop = model.loop.model_copy(update={"hidden_scale": scale})
        return loss_and_gradients(make_config(model.model_copy(update={"loop": loop})), params)

    for step, scale in ((0, 0.0), (5, 0.16), (25, 0.8), (49, 0.8)):
        loss, _, gradients = loss_and_gradients(config, params, step)
        right, _, right_gradients = loss_with(scale)
        assert float(loss) == pytest.approx(float(right), rel=1e-6)
        close(gradients, right_gradients, rtol=1e-4, atol=1e-5)


def test_gates_and_learned_scales_start_where_they_are_told():
    model = small_config("plt", 2, gate_bias=4.0, learned_hidden_scale=True, hidden_scale=0.3)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = unbox(jax.jit(Transformer(model).init)(jax.random.key(0), tokens)["params"])
    np.testing.assert_array_equal(params["layers"]["gate_bias"], np.full((2, 4), 4.0))
    np.testing.assert_allclose(params["hidden_scale"], np.full(16, 0.3), rtol=1e-6)


@pytest.mark.parametrize(
    ("training", "model", "message"),
    [
        ({"loop_losses": [0.5]}, MODELS["plt"], "loop_losses has 1 numbers, but a model of 3"),
        ({"loop_counts": [1.0, 1.0]}, MODELS["plt"], "loop_counts has 2 numbers"),
        ({"loop_counts": [0.0, 0.0, 0.0]}, MODELS["plt"], "are all 0"),
        ({"exit_entropy": 0.1}, small_config("plt"), "set model.loop.exit_gate to true"),
        (
            {"exit_entropy": 0.1, "loop_losses": [1.0, 1.0]},
            MODELS["plt"],
            "two ways to weigh the loops' losses",
        ),
        ({"hidden_scale_warmup": 0.5}, small_config("vanilla_loop"), "does not have; leave it"),
        (
            {"loop_losses": [1.0]},
            small_config("plt", layers=2, last_layer=0, moe={"experts": 2}),
            "loop_losses with experts behind the loops .* is not supported",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(training, model, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        make_config(model, training=training)


def test_drawn_loops_and_limits_of_the_loss_exclude_one_another():
    config = make_config(MODELS["plt"], training={"loop_counts": [1.0, 1.0, 1.0]})
    values = config.model_dump() | {"guard": {"spike_deviations": 6.0}}
    with pytest.raises(pydantic.ValidationError, match="would skip those of few loops"):
        RunConfig.model_validate(values)


def test_variants_of_a_run_keep_what_their_loops_can_have():
    training = {"loop_losses": [0.5], "hidden_scale_warmup": 0.5}
    model = small_config("plt", 2, learned_hidden_scale=True, exit_gate=True)
    config = make_config(model, training=training)
    assert Variant("plt", 2).apply_to_run(config) == config
    for scheme in ("vanilla_loop", "no_loop"):
        run = Variant(scheme, 1 if scheme == "no_loop" else 2).apply_to_run(config)
        assert not run.model.loop.learned_hidden_scale and not run.training.hidden_scale_warmup
        assert run.training.loop_losses == (() if scheme == "no_loop" else (0.5,))
    with pytest.raises(InputError, match=r"plt-3: training\.loop_losses has 1 numbers"):
        Variant("plt", 3).apply_to_run(config)
    gated = make_config(model, training={"exit_entropy": 0.1})
    assert Variant("no_loop", 1).apply_to_run(gated).training.exit_entropy is None


def test_losses_at_every_loop_cost_their_readouts():
    model = small_config("clp", 3, layers=4, first_layer=1, last_layer=1)
    one = train_flops(make_config(model)).by_loop
    all_loops = train_flops(make_config(model, training={"loop_losses": [1.0, 1.0]})).by_loop
    T = model.max_length
    products = 2 * (2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 16 * 31)
    attention = 4 * 16 * 2 * (T + 1) // 2
    readout = 3 * 8 * T * (products + attention)
    assert [more - less for more, less in zip(all_loops, one, strict=True)] == [readout, readout, 0]
