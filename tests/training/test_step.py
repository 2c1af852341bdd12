"""The train step: what is minimised, over what, and that it gets smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plt_jax import Transformer
from plt_jax.config import RunConfig
from plt_jax.distributed.mesh import make_mesh
from plt_jax.training import step as module
from plt_jax.training.guard import Limits
from plt_jax.training.program import TrainProgram
from tests import reference
from tests.models import random_params, reference_settings, small_config
from tests.training.runs import flat

MODEL = small_config(window=3, layers=1)

compiled_gradients = jax.jit(module.accumulate_gradients, static_argnums=0)
compiled_loss = jax.jit(module.batch_loss, static_argnums=0)


def accumulate_gradients(config, params, batch, step=0):
    return compiled_gradients(config, params, batch, step)


def batch_loss(config, params, batch, step=0):
    return compiled_loss(config, params, batch, step)


def make_config(model=MODEL, seed=0, training=None, **optimizer) -> RunConfig:
    steady = {"schedule": "constant", "warmup_fraction": 0.0}
    return RunConfig(
        seed=seed,
        model=model,
        optimizer=steady | optimizer,
        training={"steps": 50, "batch_size": 8} | (training or {}),
    )


def make_batch(seed=0, rows=8, length=12, model=MODEL):
    """Packed documents; targets at their ends, and some more, have weight 0."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, model.vocab_size, (rows, length + 1), np.int32)
    ids = np.cumsum(random.random((rows, length + 1)) < 0.2, axis=1, dtype=np.int32) + 1
    same = (ids[:, 1:] == ids[:, :-1]).astype(np.float32)
    # Rows of very different weight, so that micro-batches differ.
    same[: rows // 2] *= random.random((rows // 2, length)) < 0.4
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ids[:, :-1],
        "weights": same,
    }


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    largest = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - largest).sum(-1, keepdims=True)) + largest
    return logits - log_z, log_z[..., 0]


def hand_computed(params, batch):
    """Negative log-likelihoods and log-normalisers, float64 [B, T]."""
    logits = jax.jit(Transformer(MODEL).apply)(
        {"params": params}, batch["tokens"], batch["segment_ids"]
    )
    log_p, log_z = log_softmax(logits)
    return -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0], log_z


def move(params, direction, distance):
    return jax.tree.map(lambda leaf, along: leaf + distance * along, params, direction)


def close(one, other, rtol=1e-5, atol=1e-6):
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow(reason="compiles another train step")
def test_the_loss_is_the_mean_over_weighted_targets():
    params, batch = random_params(MODEL), make_batch()
    nll, _ = hand_computed(params, batch)
    metrics, _ = accumulate_gradients(make_config(), params, batch)
    expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_the_z_loss_is_the_weighted_squared_log_normaliser():
    params, batch = random_params(MODEL), make_batch()
    nll, log_z = hand_computed(params, batch)
    weights = batch["weights"]
    loss, sums = batch_loss(make_config(training={"z_loss": 0.3}), params, batch)
    expected = (nll * weights).sum() + 0.3 * (log_z**2 * weights).sum()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(sums["loss"]) == pytest.approx((nll * weights).sum(), rel=1e-5)


@pytest.mark.slow(reason="compiles another train step")
def test_the_z_loss_reaches_the_gradient_but_not_the_reported_loss():
    params, batch = random_params(MODEL), make_batch()
    plain, gradients = accumulate_gradients(make_config(), params, batch)
    config = make_config(training={"z_loss": 0.3})
    with_z, z_gradients = accumulate_gradients(config, params, batch)
    assert float(with_z["loss"]) == float(plain["loss"])
    total = batch["weights"].sum()
    # Along the gradient, the loss grows by the gradient's norm.
    norm = float(optax.global_norm(z_gradients))
    ahead, behind = (
        batch_loss(config, move(params, z_gradients, sign * 1e-2 / norm), batch)[0]
        for sign in (1, -1)
    )
    assert float(ahead - behind) / 2e-2 / total == pytest.approx(norm, rel=1e-2)
    largest = jax.tree.map(lambda a, b: float(abs(a - b).max()), z_gradients, gradients)
    assert min(largest["head"], largest["layers"]["q"]) > 1e-4


def test_targets_of_weight_zero_do_not_count():
    params, batch = random_params(MODEL), make_batch()
    other = batch | {
        "targets": np.where(batch["weights"] > 0, batch["targets"], (batch["targets"] + 7) % 31)
    }
    assert (other["targets"] != batch["targets"]).any()
    config = make_config(training={"z_loss": 0.3})
    one, two = (accumulate_gradients(config, params, b) for b in (batch, other))
    close(one, two, rtol=0, atol=0)


def test_a_batch_without_targets_changes_nothing_and_is_finite():
    params, batch = random_params(MODEL), make_batch()
    batch = batch | {"weights": np.zeros_like(batch["weights"])}
    metrics, gradients = accumulate_gradients(make_config(), params, batch)
    assert float(metrics["loss"]) == 0.0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow(reason="compiles another train step")
def test_states_and_gates_are_means_over_targets():
    params, batch = random_params(MODEL), make_batch()
    _, sums = batch_loss(make_config(), params, batch)
    settings = reference_settings(MODEL)
    expected = reference.forward(settings, params, batch["tokens"], batch["segment_ids"])
    weights = batch["weights"]
    for found, raw in zip(sums["hidden_norm_by_loop"], expected["raw_loops"], strict=True):
        rms = np.sqrt(np.mean(np.square(raw), axis=-1))
        assert float(found) == pytest.approx(float((rms * weights).sum()), rel=1e-5)
    (gates,) = [mean for mean in expected["gate_means"] if mean is not None]
    assert sums["gate_by_loop"].shape == (1, 1)
    expected = float((gates * weights.sum(1)).sum())
    assert float(sums["gate_by_loop"][0, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow(reason="compiles another train step")
def test_accumulation_gives_the_whole_batchs_gradient():
    params, batch = random_params(MODEL), make_batch()
    totals = [batch["weights"][start::2].sum() for start in range(2)]
    assert len(set(totals)) == 2, "the micro-batches should weigh differently"
    whole = accumulate_gradients(make_config(training={"z_loss": 0.3}), params, batch)
    config = make_config(training={"accumulate": 2, "z_loss": 0.3})
    close(accumulate_gradients(config, params, batch), whole)


def build(config: RunConfig) -> TrainProgram:
    return TrainProgram.build(config, make_mesh(config.mesh))


def take_steps(config: RunConfig, batches):
    program, metrics = build(config), []
    state = program.init_state()
    for batch in batches:
        state, values = program.step(state, batch)
        metrics.append(flat(values))
    return state, metrics


# An epsilon well above rounding, since Adam divides tiny gradients by themselves. The first two of
# fifty steps warm up.
LEARNING = {
    "learning_rate": 2e-2,
    "warmup_fraction": 0.04,
    "epsilon": 1e-3,
    "clip_norm": 0.3,
}


@pytest.mark.slow(reason="compiles several train steps")
def test_accumulation_gives_the_same_updates():
    batches = [make_batch(seed) for seed in range(3)]
    (state, metrics), (other_state, other_metrics) = (
        take_steps(make_config(training={"accumulate": parts}, **LEARNING), batches)
        for parts in (1, 4)
    )
    assert int(state.step) == int(other_state.step) == 3
    close(other_state.params, state.params, rtol=0, atol=1e-6)
    for one, two in zip(metrics, other_metrics, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.slow(reason="compiles a train step")
def test_a_step_takes_the_old_states_memory():
    """Two states of a large model would not fit into a device."""
    program = build(make_config(**LEARNING))
    old = program.init_state()
    program.step(old, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


@pytest.mark.slow(reason="trains until the loss is small")
def test_one_batch_can_be_learned_by_heart():
    state, metrics = take_steps(make_config(**LEARNING), [make_batch(3)] * 50)
    losses = [values["loss"] for values in metrics]
    assert losses[0] == pytest.approx(np.log(31), rel=0.35)
    assert losses[-1] < 0.1 * losses[0]
    assert int(state.step) == 50


@pytest.mark.slow(reason="compiles another train step")
def test_metrics_are_the_gradients_norm_and_the_rate_that_was_used():
    batch, config = make_batch(3), make_config(**LEARNING)
    params = build(config).init_params()
    _, gradients = accumulate_gradients(make_config(), params, batch)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradients)))
    _, metrics = take_steps(config, [batch] * 3)
    # Before clipping.
    assert metrics[0]["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.3
    rates = [values["learning_rate"] for values in metrics]
    assert rates == pytest.approx([0.0, 0.01, 0.02], rel=1e-5)
    # A rate of 0 moves nothing, so the second step sees the same loss.
    assert metrics[1]["loss"] == metrics[0]["loss"] != metrics[2]["loss"]


@pytest.mark.slow(reason="compiles another train step")
@pytest.mark.parametrize(
    ("spoil", "limits"),
    [
        ({"weights": np.nan}, Limits()),
        ({"weights": np.inf}, Limits()),
        ({}, Limits(loss=np.float32(1.0))),
        ({}, Limits(gradient_norm=np.float32(1e-3))),
    ],
    ids=["not a number", "infinite", "loss", "gradient"],
)
def test_a_step_out_of_order_changes_nothing_but_the_count(spoil, limits):
    config = make_config(**LEARNING)
    program = build(config)
    state, values = program.step(program.init_state(), make_batch(0))
    assert values["skipped"] == 0
    before = jax.tree.map(np.asarray, state)
    bad = make_batch(1)
    state, values = program.step(
        state, bad | {k: np.full_like(bad[k], v) for k, v in spoil.items()}, limits
    )
    assert values["skipped"] == 1
    assert int(state.step) == 2
    close((state.params, state.opt_state), (before.params, before.opt_state), rtol=0, atol=0)
    state, values = program.step(state, bad)
    assert values["skipped"] == 0
    undisturbed, rates = take_steps(config, [make_batch(0), bad])
    close(state.params, undisturbed.params, rtol=0, atol=0)
    assert values["learning_rate"] == rates[1]["learning_rate"] > 0
