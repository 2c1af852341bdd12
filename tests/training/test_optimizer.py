"""Learning rates by step, which parameters decay, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plt_jax.config import OptimizerConfig
from plt_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from tests.models import random_params, small_config

DECAYING = {"head", "q", "k", "v", "o", "ffn_gate", "ffn_up", "ffn_down"}


def rates(steps: int, **settings) -> np.ndarray:
    """The learning rate at steps 0 to `steps`."""
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **settings), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_warmup_is_linear_from_zero_to_the_peak(schedule):
    got = rates(100, schedule=schedule, warmup_fraction=0.1)
    np.testing.assert_allclose(got[:11], np.linspace(0.0, 2.0, 11), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_without_a_warmup_the_first_step_has_the_peak(schedule):
    assert rates(100, schedule=schedule, warmup_fraction=0.0)[0] == 2.0


def test_cosine_falls_to_the_final_share():
    got = rates(100, schedule="cosine", warmup_fraction=0.2, final_fraction=0.25)
    progress = np.arange(81) / 80
    expected = 2.0 * (0.25 + 0.75 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(got[20:], expected, rtol=1e-5)
    assert got[60] == pytest.approx(1.25)
    assert got[100] == pytest.approx(0.5)


def test_wsd_has_a_plateau_and_a_linear_decay():
    got = rates(100, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.4, final_fraction=0.1)
    assert (got[10:61] == 2.0).all()
    np.testing.assert_allclose(got[60:], np.linspace(2.0, 0.2, 41), rtol=1e-5)


def test_constant_stays_at_the_peak():
    got = rates(100, schedule="constant", warmup_fraction=0.05, final_fraction=0.0)
    assert (got[5:] == 2.0).all()


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_have_usable_rates(schedule, steps):
    got = rates(steps, schedule=schedule)
    assert np.isfinite(got).all() and (got >= 0).all() and (got <= 2.0).all()
    assert got[:steps].max() > 0


MODELS = {
    "plt": small_config(),
    "hidden gate": small_config(gate_input="hidden", ffn_output_norm=True, qk_norm=True),
    "tied": small_config("no_loop", count=1, tied_embeddings=True),
    "clp": small_config("clp"),
}


@pytest.mark.parametrize("name", MODELS)
def test_only_projections_and_the_head_decay(name):
    model = MODELS[name]
    params, mask = random_params(model), decay_mask(model)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    decaying = {
        path[-1].key for path, decays in jax.tree_util.tree_leaves_with_path(mask) if decays
    }
    assert decaying == DECAYING - ({"head"} if model.tied_embeddings else set())


def test_with_zero_gradients_only_decaying_parameters_shrink():
    model = MODELS["hidden gate"]
    config = OptimizerConfig(
        learning_rate=0.5, schedule="constant", warmup_fraction=0.0, weight_decay=0.1
    )
    optimizer = make_optimizer(config, model, make_schedule(config, 10))
    params = random_params(model)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    changed = optax.apply_updates(params, updates)
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(changed), strict=True
    ):
        factor = 1.0 - 0.5 * 0.1 if path[-1].key in DECAYING else 1.0
        np.testing.assert_allclose(after, factor * before, rtol=1e-6, err_msg=path[-1].key)


def first_moment(config: OptimizerConfig, gradients):
    """Adam's running mean after one step from nothing, divided by 1 - beta1."""
    model = MODELS["clp"]
    optimizer = make_optimizer(config, model, make_schedule(config, 10))
    params = random_params(model)
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    mean = optax.tree_utils.tree_get(state, "mu")
    return jax.tree.map(lambda leaf: np.asarray(leaf) / (1 - config.beta1), mean)


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize(
    ("clip_norm", "norm", "expected"), [(1.0, 5.0, 1.0), (1.0, 0.5, 0.5), (None, 5.0, 5.0)]
)
def test_gradients_are_clipped_by_their_global_norm(clip_norm, norm, expected):
    raw = random_params(MODELS["clp"], seed=5)
    gradients = jax.tree.map(lambda leaf: leaf * norm / optax.global_norm(raw), raw)
    got = first_moment(OptimizerConfig(clip_norm=clip_norm), gradients)
    assert float(optax.global_norm(got)) == pytest.approx(expected, rel=1e-5)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other * expected / norm, rtol=1e-4, atol=1e-8)


def test_adam_is_as_the_paper_has_it():
    model = MODELS["clp"]
    config = OptimizerConfig(
        **{"learning_rate": 0.1, "schedule": "constant", "warmup_fraction": 0.0},
        **{"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "weight_decay": 0.0, "clip_norm": None},
    )
    optimizer = make_optimizer(config, model, make_schedule(config, 10))
    params = random_params(model)
    gradients = [random_params(model, seed) for seed in (1, 2)]
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
    one, two = (np.asarray(gradient["head"], np.float64) for gradient in gradients)
    mean = (0.2 * 0.8 * one + 0.2 * two) / (1 - 0.8**2)
    square = (0.1 * 0.9 * one**2 + 0.1 * two**2) / (1 - 0.9**2)
    np.testing.assert_allclose(
        updates["head"], -0.1 * mean / (np.sqrt(square) + 1e-3), rtol=2e-5, atol=1e-7
    )
