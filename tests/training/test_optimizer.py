"""Learning rates by step, which parameters decay, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plt_jax.config import OptimizerConfig
from plt_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, matrix_axes
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


# ---- Muon ----

MUON = {"name": "muon", "schedule": "constant", "warmup_fraction": 0.0, "clip_norm": None}


def one_step(config: OptimizerConfig, model, gradients):
    """The updates and the state after one step."""
    optimizer = make_optimizer(config, model, make_schedule(config, 10))
    params = random_params(model)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)


def singular_values(update, axes):
    """Those of each of a parameter's matrices, [matrices, values]."""
    inputs, outputs = axes.reduction_axis, axes.output_axis
    batch = tuple(i for i in range(update.ndim) if i not in (*inputs, *outputs))
    rows = int(np.prod([update.shape[axis] for axis in inputs]))
    columns = int(np.prod([update.shape[axis] for axis in outputs]))
    matrices = np.transpose(update, (*batch, *inputs, *outputs)).reshape(-1, rows, columns)
    return np.linalg.svd(matrices, compute_uv=False), max(rows, columns), len(matrices)


MIXTURE = small_config(
    moe={"experts": 4, "experts_per_token": 2, "expert_width": 24, "shared_width": 8}
)


@pytest.mark.parametrize("model", [small_config(layers=3), MIXTURE], ids=["dense", "mixture"])
def test_muon_makes_each_layers_and_experts_matrix_nearly_orthogonal(model):
    config = OptimizerConfig(**MUON, learning_rate=0.5, weight_decay=0.0)
    updates, _ = one_step(config, model, random_params(model, seed=1))
    axes, counts = matrix_axes(model), {}
    for name, of_one in axes["layers"].items():
        if of_one is None:
            continue
        values, longer, counts[name] = singular_values(np.asarray(updates["layers"][name]), of_one)
        # Five steps of Muon's iteration bring singular values between 0.7 and 1.2.
        scaled = values / (0.5 * 0.2 * np.sqrt(longer))
        assert scaled.min() > 0.3 and scaled.max() < 1.3, name
    layers = model.layers
    expected = dict.fromkeys(("q", "k", "v", "o"), layers)
    if model.moe.experts:
        expected |= dict.fromkeys(("expert_gate", "expert_up", "expert_down"), 4 * layers)
        expected |= dict.fromkeys(("shared_gate_proj", "shared_up", "shared_down"), layers)
    else:
        expected |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), layers)
    assert counts == expected


def test_muon_leaves_all_other_parameters_to_adam():
    model = MODELS["hidden gate"]
    gradients = random_params(model, seed=1)
    common = {name: value for name, value in MUON.items() if name != "name"}
    muon, _ = one_step(OptimizerConfig(**MUON), model, gradients)
    adam, _ = one_step(OptimizerConfig(**common), model, gradients)
    axes = matrix_axes(model)
    for name in ("embedding", "final_norm", "head"):
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-6)
    for name, of_one in axes["layers"].items():
        same = np.allclose(muon["layers"][name], adam["layers"][name], rtol=1e-5, atol=1e-9)
        assert same == (of_one is None), name


def test_muons_matrices_have_a_learning_rate_of_their_own():
    model = MODELS["clp"]
    gradients = random_params(model, seed=1)
    settings = MUON | {"learning_rate": 0.1, "weight_decay": 0.0}
    one, _ = one_step(OptimizerConfig(**settings), model, gradients)
    three, _ = one_step(OptimizerConfig(**settings, muon_learning_rate=0.3), model, gradients)
    np.testing.assert_allclose(three["layers"]["q"], 3 * one["layers"]["q"], rtol=1e-5)
    np.testing.assert_allclose(three["head"], one["head"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_running_means_can_be_bfloat16(name):
    model = MODELS["clp"]
    config = OptimizerConfig(name=name, momentum_dtype="bfloat16")
    _, state = one_step(config, model, random_params(model, seed=1))
    dtypes = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.ndim > 1
    }
    assert {dtype for path, dtype in dtypes.items() if ".mu" in path} == {jnp.dtype("bfloat16")}
    assert {dtype for path, dtype in dtypes.items() if ".nu" in path} == {jnp.dtype("float32")}


@pytest.mark.parametrize("field", [{"muon_learning_rate": 0.1}, {"muon_momentum": 0.9}])
def test_fields_of_muon_are_refused_without_it(field):
    with pytest.raises(ValueError, match="is a field of muon; set name to muon"):
        OptimizerConfig(**field)
