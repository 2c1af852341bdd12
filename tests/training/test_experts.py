"""Training with experts: what is reported of the routers, their biases, and routers that fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import Transformer
from plt_jax.config import RunConfig
from plt_jax.distributed.mesh import make_mesh
from plt_jax.model.moe import experts_per_step
from plt_jax.runs.directory import open_trained
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.resume import check_directory
from plt_jax.training import objective, trainer
from plt_jax.training.guard import describe_skip
from plt_jax.training.program import TrainProgram
from tests.models import random_params, small_config
from tests.training.runs import tiny_config
from tests.training.test_step import make_batch

MOE = {"experts": 4, "experts_per_token": 2, "expert_width": 8}
LAYERS = 2


def make_config(accumulate=1, **moe) -> RunConfig:
    return RunConfig(
        model=small_config(layers=LAYERS, moe=MOE | moe),
        optimizer={"schedule": "constant", "warmup_fraction": 0.0},
        training={"steps": 50, "batch_size": 8, "accumulate": accumulate},
    )


def take_steps(config: RunConfig, count: int = 1, change=lambda state: state):
    """The state after some steps on one batch from a changed start, and all steps' metrics."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = TrainProgram.build(config, mesh)
    state = change(program.init_state())
    batch, metrics = make_batch(model=config.model), []
    # Every micro-batch weighs the same, as means over tokens and over targets then do.
    batch["weights"] = np.ones_like(batch["weights"])
    for _ in range(count):
        state, values = program.step(state, batch)
        metrics.append(jax.device_get(values))
    return state, metrics


def with_layers(state, **values):
    """A state with some parameters of the layers filled with a value."""
    layers = state.params["layers"]
    filled = {name: jnp.full_like(layers[name], value) for name, value in values.items()}
    return state.replace(params=state.params | {"layers": layers | filled})


def break_second_router(state):
    layers = state.params["layers"]
    broken = {"router": layers["router"].at[1].set(jnp.nan)}
    return state.replace(params=state.params | {"layers": layers | broken})


@pytest.mark.slow(reason="compiles several train steps")
def test_routers_are_reported_by_loop_and_layer():
    _, (metrics,) = take_steps(make_config())
    for name in ("expert_load_entropy_by_loop", "expert_max_load_by_loop", "router_z_by_loop"):
        assert metrics[name].shape == (2, LAYERS)
    assert len(np.unique(metrics["router_z_by_loop"])) == 2 * LAYERS
    assert metrics["expert_load_entropy"] == pytest.approx(
        metrics["expert_load_entropy_by_loop"].mean()
    )
    assert metrics["expert_max_load"] == metrics["expert_max_load_by_loop"].max()
    assert metrics["expert_dropped"] == 0.0
    np.testing.assert_array_equal(metrics["expert_dropped_by_loop"], np.zeros((2, LAYERS)))
    # One sequence's step has two rows of two choices.
    assert 2.0 <= metrics["experts_per_step"] <= 4.0


@pytest.mark.slow(reason="compiles another train step")
def test_loops_over_part_of_a_mixture():
    """Every router of every part is balanced, and its loss counts once for each loop."""
    moe = MOE | {"bias_update_rate": 0.01, "dense_layers": 1, "load_balance_loss": 0.3}
    model = small_config(layers=5, first_layer=2, last_layer=3, moe=moe)
    config = make_config().model_copy(update={"model": model})
    params = random_params(model)
    copied = jax.tree.map(jnp.array, params)  # a step donates its state
    state, (metrics,) = take_steps(config, change=lambda state: state.replace(params=copied))
    assert metrics["expert_max_load_by_loop"].shape == (2, 2)
    assert metrics["expert_max_load"] >= metrics["expert_max_load_by_loop"].max()

    batch = make_batch(model=model)
    states = Transformer(model).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], method="loop_states"
    )
    outer_1JX, core_LJX = states.outer_router.load_X, states.router.load_X
    loads = {"prelude": outer_1JX[:, :1], "layers": core_LJX, "coda": outer_1JX[:, 1:]}
    for name, load_LJX in loads.items():
        moved = state.params[name]["router_bias"] - params[name]["router_bias"]
        expected = 0.01 * np.sign(0.25 - load_LJX).swapaxes(0, 1)
        np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert (np.sign(0.25 - loads["prelude"]) != np.sign(0.25 - loads["coda"])).any()

    balance = np.concatenate(
        [
            4 * np.sum(one.load_X * one.probability_X, axis=-1).ravel()
            for one in (states.router, states.outer_router)
        ]
    )
    assert len(balance) == 2 * 2 + 2
    unbalanced = model.model_copy(
        update={"moe": model.moe.model_copy(update={"load_balance_loss": 0.0})}
    )
    losses = [
        objective.batch_loss(config.model_copy(update={"model": one}), params, batch, 0)[0]
        for one in (model, unbalanced)
    ]
    expected = 0.3 * balance.mean() * batch["weights"].sum()
    assert float(losses[0] - losses[1]) == pytest.approx(expected, rel=1e-3)


def test_experts_per_step_counts_those_that_differ():
    """Two loops of three positions with two choices: all the same, one of them, none."""
    first, second = [[0, 1], [0, 1], [0, 1]], [[1, 0], [1, 2], [2, 3]]
    chosen_LBTk = jnp.array([[first], [second]])
    assert experts_per_step(chosen_LBTk) == pytest.approx((2 + 3 + 4) / 3)


@pytest.mark.slow(reason="compiles several train steps")
def test_micro_batches_report_and_move_what_the_whole_batch_does():
    # Without the loss of balance, which is one of each micro-batch.
    moe = {"bias_update_rate": 0.05, "load_balance_loss": 0.0}
    whole, (metrics,) = take_steps(make_config(**moe))
    split, (others,) = take_steps(make_config(2, **moe))
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], rtol=1e-5, err_msg=name)
    biases = (state.params["layers"]["router_bias"] for state in (whole, split))
    np.testing.assert_array_equal(*biases)


@pytest.mark.slow(reason="compiles several train steps")
def test_biases_move_by_the_rate_towards_an_even_load():
    config = make_config(bias_update_rate=0.05, load_balance_loss=0.0)
    state, (metrics,) = take_steps(config)
    bias_JLX = np.asarray(state.params["layers"]["router_bias"])
    moved = np.abs(bias_JLX)
    assert np.all(np.isclose(moved, 0.05) | (moved == 0.0))
    # Someone has too much in every loop and layer, and someone too little.
    assert (bias_JLX.min(-1) < 0).all()
    assert (bias_JLX.max(-1) > 0).all()
    state, metrics = take_steps(config, 20)
    bias_JLX = np.asarray(state.params["layers"]["router_bias"])
    assert (bias_JLX[:, 0] != bias_JLX[:, 1]).any(-1).all()
    first, last = (step["expert_load_entropy_by_loop"] for step in (metrics[0], metrics[-1]))
    assert (last > first).mean() >= 0.75
    assert last.mean() > 0.98


@pytest.mark.slow(reason="compiles several train steps")
def test_biases_take_no_gradient_and_no_decay():
    config = make_config(bias_update_rate=0.0)
    state, _ = take_steps(config, 2, lambda state: with_layers(state, router_bias=1.0))
    np.testing.assert_array_equal(state.params["layers"]["router_bias"], 1.0)
    assert config.optimizer.weight_decay > 0


@pytest.mark.slow(reason="trains several runs")
def test_a_run_with_experts_logs_and_opens_and_may_change_its_products(finished, tmp_path):
    moe = MOE | {"dense_layers": 1, "bias_update_rate": 0.01, "grouped_product": "ragged_dot"}
    config = tiny_config(finished.home, tmp_path / "run", model={"moe": moe}, training={"steps": 2})
    assert not trainer.train(config).stopped
    (row, *_) = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert np.shape(row["expert_load_entropy_by_loop"]) == (2, 1)
    assert row["expert_dropped"] == 0.0
    moe = config.model.moe.model_copy(update={"grouped_product": "blocks"})
    model = config.model.model_copy(update={"moe": moe})
    assert check_directory(config.model_copy(update={"model": model})) == [
        "model.moe.grouped_product: ragged_dot -> blocks"
    ]
    assert open_trained(tmp_path / "run").config.model.moe.grouped_product == "auto"


def test_a_router_that_fails_is_named():
    broken = np.array([[1.0, 2.0], [3.0, np.nan]])
    values = {"loss": np.float32("nan"), "gradient_norm": np.float32(1.0)}
    said = describe_skip(values | {"router_z_by_loop": broken}, first_layer=1)
    assert said == "the loss is nan (the first router to fail is that of layer 3 in loop 2)"
    assert describe_skip(values) == "the loss is nan"


@pytest.mark.slow(reason="compiles the train step of a mixture")
def test_a_step_with_a_broken_router_says_which():
    _, (values,) = take_steps(make_config(), 1, break_second_router)
    assert np.isnan(values["loss"])
    assert np.isfinite(values["router_z_by_loop"][0, 0])
    assert np.isnan(values["router_z_by_loop"][0, 1])
