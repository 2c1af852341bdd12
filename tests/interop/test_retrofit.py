"""Retrofits: models without loops that are given loops, before any training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import (
    InputError,
    LoopConfig,
    decode_step,
    init_cache,
    load_huggingface,
    prepare_for_decode,
)
from plt_jax.config import SCHEMES
from plt_jax.interop.options import CLOSED_GATE_BIAS
from plt_jax.interop.retrofit import compare_models, retrofit
from tests.golden.test_model import TRANSFORMERS
from tests.models import forward, random_params, random_tokens, small_config

DENSE = small_config("no_loop", 1, max_length=32)
TOKENS = random_tokens(DENSE, 2, 20)
SEGMENTS = np.array([[0] * 7 + [1] * 13, [5] * 20])


def logits_of(config, params):
    return np.asarray(forward(config)(params, TOKENS, SEGMENTS))


def repeating(scheme, count, **settings) -> LoopConfig:
    """A looping in which later loops read the same states as loop 1."""
    return LoopConfig(scheme=scheme, count=count, window=3, hidden_scale=0.0, **settings)


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize(
    ("loop", "gate_bias"),
    [
        (repeating("plt", 2), CLOSED_GATE_BIAS),
        (repeating("plt", 3, gate_input="hidden", normalize_between_loops=False), CLOSED_GATE_BIAS),
        (repeating("clp_kv_share", 2), 0.0),
        (repeating("clp", 4), 0.0),
        (repeating("plt", 3, first_layer=1), CLOSED_GATE_BIAS),
        (repeating("clp_kv_share", 2, last_layer=0), 0.0),
    ],
    ids=str,
)
def test_without_hidden_states_and_window_the_logits_are_the_sources(loop, gate_bias):
    params = random_params(DENSE)
    looped, looped_params = retrofit(DENSE, params, loop, gate_bias)
    assert looped.loop == loop.model_copy(update={"gate_bias": gate_bias})
    assert looped == DENSE.model_copy(update={"loop": looped.loop})
    np.testing.assert_allclose(
        logits_of(looped, looped_params), logits_of(DENSE, params), rtol=0, atol=1e-6
    )


@pytest.mark.slow(reason="compiles several programs")
def test_layers_in_the_middle_of_a_mixture_are_given_loops():
    moe = {"experts": 4, "expert_width": 8, "dense_layers": 2, "bias_update_rate": 0.1}
    config = small_config("no_loop", 1, max_length=32, layers=5, moe=moe)
    params = random_params(config)
    loop = repeating("plt", 3, first_layer=1, last_layer=3)
    looped, looped_params = retrofit(config, params, loop, CLOSED_GATE_BIAS)
    stacks = {name: len(looped_params[name]["q"]) for name in looped_params if "layers" in name}
    assert stacks == {"dense_layers": 1, "layers": 2}
    assert len(looped_params["dense_prelude"]["q"]) == len(looped_params["coda"]["q"]) == 1
    assert looped_params["layers"]["router_bias"].shape == (2, 3, 4)
    assert looped_params["coda"]["router_bias"].shape == (1, 1, 4)
    np.testing.assert_array_equal(looped_params["loop_norm"], np.ones(16))
    np.testing.assert_allclose(
        logits_of(looped, looped_params), logits_of(config, params), rtol=0, atol=1e-6
    )


def test_layers_that_the_model_does_not_have_cannot_loop():
    with pytest.raises(InputError, match="last_layer 7 must be layers of the model, 0 to 1"):
        retrofit(DENSE, random_params(DENSE), repeating("plt", 2, last_layer=7))
    loop = repeating("vanilla_loop", 2, learned_hidden_scale=True)
    with pytest.raises(InputError, match="the scheme vanilla_loop has no hidden_scale"):
        retrofit(DENSE, random_params(DENSE), loop)


def test_gates_start_as_the_loop_says_unless_told_otherwise():
    loop = repeating("plt", 2, gate_bias=3.0)
    for told, right in ((None, 3.0), (1.0, 1.0)):
        looped, params = retrofit(DENSE, random_params(DENSE), loop, told)
        assert looped.loop.gate_bias == right
        assert np.all(np.asarray(params["layers"]["gate_bias"]) == right)


@pytest.mark.slow(reason="compiles several programs")
def test_experts_and_their_balance_are_kept_in_every_loop():
    moe = {"experts": 4, "expert_width": 8, "dense_layers": 1, "bias_update_rate": 0.1}
    config = small_config("no_loop", 1, max_length=32, moe=moe)
    params = random_params(config)
    looped, looped_params = retrofit(config, params, repeating("plt", 3), CLOSED_GATE_BIAS)
    assert looped_params["layers"]["router_bias"].shape == (1, 3, 4)
    np.testing.assert_allclose(
        logits_of(looped, looped_params), logits_of(config, params), rtol=0, atol=1e-6
    )


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize(
    ("loop", "gate_bias"),
    [
        (repeating("plt", 2), 0.0),
        (repeating("plt", 2), 4.0),
        (repeating("plt", 2).model_copy(update={"hidden_scale": 0.1}), CLOSED_GATE_BIAS),
        (repeating("plt", 2, embedding_scale=0.7), CLOSED_GATE_BIAS),
        (repeating("vanilla_loop", 2), 0.0),
    ],
    ids=str,
)
def test_every_other_retrofit_changes_the_logits(loop, gate_bias):
    """The test above would fail if a retrofit did not repeat loop 1."""
    params = random_params(DENSE)
    looped = retrofit(DENSE, params, loop, gate_bias)
    assert np.abs(logits_of(*looped) - logits_of(DENSE, params)).max() > 1e-3


@pytest.mark.slow(reason="compiles several programs")
def test_a_more_closed_gate_starts_nearer_to_the_source():
    params = random_params(DENSE)
    starts = [
        compare_models(DENSE, params, *retrofit(DENSE, params, repeating("plt", 2), bias), TOKENS)
        for bias in (0.0, 2.0, 6.0, CLOSED_GATE_BIAS)
    ]
    assert [start.largest_logit for start in starts] == sorted(
        (start.largest_logit for start in starts), reverse=True
    )
    assert starts[0].kl_divergence > starts[1].kl_divergence > 1e-5
    assert starts[-1].largest_logit == pytest.approx(0.0, abs=1e-6)
    assert starts[-1].kl_divergence == pytest.approx(0.0, abs=1e-6)


def test_a_retrofit_decodes_as_its_source_does():
    params = random_params(DENSE)
    looped, looped_params = retrofit(DENSE, params, repeating("plt", 2), CLOSED_GATE_BIAS)
    expected = np.asarray(forward(DENSE)(params, TOKENS))
    step = jax.jit(functools.partial(decode_step, looped))
    weights, cache = prepare_for_decode(looped, looped_params), init_cache(looped, 2, 20)
    for t in range(TOKENS.shape[1]):
        logits, cache = step(weights, TOKENS[:, t], cache)
        np.testing.assert_allclose(logits, expected[:, t], rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate_input", ["query", "hidden"])
def test_the_weights_are_kept_and_the_gates_are_new(gate_input):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(DENSE))
    loop = repeating("plt", 2, gate_input=gate_input)
    _, looped = retrofit(DENSE, params, loop, gate_bias=2.0)
    new = looped["layers"].keys() - params["layers"].keys()
    names = {"gate_weight", "gate_bias"} | ({"gate_norm"} if gate_input == "hidden" else set())
    assert new == names
    for name in params["layers"]:
        assert looped["layers"][name] is params["layers"][name]
    assert {looped["layers"][name].dtype for name in names} == {jnp.dtype("bfloat16")}
    assert np.all(looped["layers"]["gate_bias"] == 2.0)
    assert np.all(looped["layers"]["gate_weight"] == 0.0)


@pytest.mark.slow(reason="compiles every scheme")
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "no_loop"])
def test_an_imported_model_takes_any_scheme(scheme):
    config, params = load_huggingface(TRANSFORMERS / "qwen2")
    looped, looped_params = retrofit(config, params, LoopConfig(scheme=scheme, window=4))
    tokens = random_tokens(config, 1, 9)
    assert np.all(np.isfinite(forward(looped)(looped_params, tokens)))


def test_a_retrofit_of_a_looped_model_is_refused():
    config = small_config("plt", 2)
    with pytest.raises(InputError, match=r"already loops \(plt, 2 loops\)"):
        retrofit(config, random_params(config), LoopConfig())


def test_a_retrofit_to_no_loop_is_refused():
    with pytest.raises(InputError, match="the scheme no_loop does not loop"):
        retrofit(DENSE, random_params(DENSE), LoopConfig(scheme="no_loop"))
