"""The forward pass and its gradients against the reference, which shares no code with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax import ModelConfig, Transformer
from plt_jax.errors import InputError
from plt_jax.model import block
from plt_jax.model.block import apply_block
from plt_jax.model.looping import with_loops
from plt_jax.model.loss import cross_entropy
from tests import reference
from tests.models import (
    ALL,
    LOOPED,
    forward,
    forward_with_states,
    random_params,
    random_tokens,
    reference_settings,
    small_config,
)
from tests.tiers import slow_but

TOLERANCE = 1e-4
B, T = 2, 24

# Ids that come back (7), and documents of one token: inside, first and last.
SEGMENTS = np.array([[7] * 10 + [3] + [7] * 9 + [0] * 4, [1] + [2] * 13 + [5] + [2] * 8 + [1]])

MIXTURE = {"experts": 4, "expert_width": 8, "bias_update_rate": 0.1}

VARIANTS = {
    "window_of_one": small_config(window=1, gate_input="hidden", qkv_bias=True),
    "window_beyond_the_end": small_config(window=30, qk_norm=True),
    "scales_without_norm": small_config(
        count=3, embedding_scale=0.707, hidden_scale=0.053, normalize_between_loops=False
    ),
    "tied_ffn_norm": small_config(
        "loop_kv_share_window",
        tied_embeddings=True,
        normalize_between_loops=False,
        ffn_output_norm=True,
    ),
    "one_key_head": small_config(
        count=4,
        gate_input="hidden",
        tied_embeddings=True,
        qk_norm=True,
        ffn_output_norm=True,
        kv_heads=1,
        head_width=6,
    ),
    "own_keys_per_head": small_config(
        "clp", 3, embedding_scale=0.5, normalize_between_loops=False, kv_heads=4, rope_theta=100.0
    ),
    "the_middle_loops": small_config(layers=4, first_layer=1, last_layer=2),
    "the_middle_loops_serially": small_config(
        "vanilla_loop", 3, layers=4, first_layer=1, last_layer=2, normalize_between_loops=False
    ),
    "a_prelude": small_config("clp", 3, layers=3, first_layer=1, embedding_scale=0.5),
    "a_coda": small_config("loop_kv_share_window", 4, layers=3, last_layer=1),
    "the_middle_loops_experts": small_config(
        "plt", 3, layers=4, first_layer=1, last_layer=2, moe=MIXTURE | {"dense_layers": 2}
    ),
    "dense_loops_before_experts": small_config(
        "plt", 2, layers=3, last_layer=1, moe=MIXTURE | {"dense_layers": 2}
    ),
    "post_norm": small_config(
        input_norms=False,
        attention_output_norm=True,
        ffn_output_norm=True,
        qk_norm=True,
        qk_norm_over="all_heads",
    ),
    "learned_scale": small_config(
        count=3, learned_hidden_scale=True, embedding_scale=0.5, residual_scale=0.3
    ),
    "sandwich": small_config(
        "vanilla_loop", 3, attention_output_norm=True, ffn_output_norm=True, output_bias=True
    ),
    "biases_stretched_rope": small_config(
        qkv_bias=True,
        output_bias=True,
        qk_norm=True,
        head_width=8,
        rope_theta=50.0,
        rope_scaling={"kind": "llama3", "factor": 8.0, "original_length": 12},
    ),
}


def largest_difference(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return np.max(np.abs(actual - expected))


def check_against_reference(config: ModelConfig, tokens, segment_ids, positions=None):
    params = random_params(config)
    logits, states = forward_with_states(config)(params, tokens, segment_ids, positions)
    expected = reference.forward(reference_settings(config), params, tokens, segment_ids, positions)
    assert largest_difference(states.hidden_LBTD, expected["raw_loops"]) < TOLERANCE
    assert largest_difference(states.output_LBTD, expected["hidden_loops"]) < TOLERANCE
    rms = np.sqrt(np.mean(np.square(expected["raw_loops"]), axis=-1))
    assert largest_difference(states.rms_LBT, rms) < TOLERANCE
    gates = [mean for mean in expected["gate_means"] if mean is not None]
    assert (states.gate_LJB is None) == (not gates)
    if gates:
        shape = config.loop.count - 1, len(config.looped_layers), -1
        gates_LJB = np.reshape(gates, shape)
        assert largest_difference(states.gate_LJB, gates_LJB) < TOLERANCE
    assert largest_difference(logits, expected["logits"]) < TOLERANCE


MOSTLY_SLOW = slow_but([("plt", 2)], ALL, "compiles another scheme")


@pytest.mark.parametrize(("scheme", "count"), MOSTLY_SLOW)
def test_packed_documents(scheme, count):
    config = small_config(scheme, count)
    check_against_reference(config, random_tokens(config, B, T), SEGMENTS)


@pytest.mark.parametrize(("scheme", "count"), MOSTLY_SLOW)
def test_whole_rows(scheme, count):
    config = small_config(scheme, count)
    params, tokens = random_params(config), random_tokens(config, 3, T, seed=1)
    expected = reference.forward(reference_settings(config), params, tokens)["logits"]
    assert largest_difference(forward(config)(params, tokens), expected) < TOLERANCE


OPTIONS = slow_but(["tied_ffn_norm"], VARIANTS, "compiles another model")


@pytest.mark.parametrize("variant", OPTIONS)
def test_options(variant):
    config = VARIANTS[variant]
    check_against_reference(config, random_tokens(config, B, T), SEGMENTS)


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
def test_explicit_positions_are_ropes_alone(segment_ids):
    """They need not count up, and documents, shift and windows do not follow them."""
    config = small_config("plt", 3)
    positions = np.random.default_rng(0).integers(0, 50, (B, T))
    check_against_reference(config, random_tokens(config, B, T), segment_ids, positions)


@pytest.mark.slow(reason="compares many packings with the reference")
@pytest.mark.parametrize("scheme", ["plt", "clp", "loop_kv_share_window"])
@settings(max_examples=12, derandomize=True)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.05, 0.3, 0.9]))
def test_any_packing(scheme, seed, share):
    """Documents that begin anywhere; `share` is how often."""
    rng = np.random.default_rng(seed)
    segment_ids = np.cumsum(rng.random((B, T)) < share, axis=1) % 3
    config = small_config(scheme, 3)
    check_against_reference(config, random_tokens(config, B, T, seed), segment_ids)


READOUTS = {
    "normed between": small_config("plt", 3),
    "raw between": small_config("plt", 3, normalize_between_loops=False),
    "behind a coda": small_config("plt", 3, layers=3, last_layer=1),
}


@pytest.mark.parametrize("case", slow_but(["raw between"], READOUTS, "compiles another model"))
def test_readout_of_every_loop(case):
    """What the head says if each loop is the last; the last loop's is the model's."""
    config = READOUTS[case]
    params, tokens = random_params(config), random_tokens(config, B, T)
    logits = jax.jit(
        lambda params: Transformer(config).apply(
            {"params": params}, tokens, SEGMENTS, method="logits_by_loop"
        )
    )(params)
    expected = reference.forward(reference_settings(config), params, tokens, SEGMENTS)
    readouts = np.stack(expected["readouts"])
    assert largest_difference(logits, readouts @ params["head"]) < TOLERANCE
    assert largest_difference(logits[-1], expected["logits"]) < TOLERANCE
    for count in range(1, config.loop.count):  # of fewer loops, it is the model
        fewer = reference_settings(with_loops(config, params, count)[0])
        shorter = reference.forward(fewer, params, tokens, SEGMENTS)["logits"]
        assert largest_difference(logits[count - 1], shorter) < TOLERANCE


@pytest.mark.parametrize(("scheme", "count"), [case for case in LOOPED if case[1] == 1])
def test_one_loop_is_the_plain_transformer(scheme, count):
    plain, looped = small_config("no_loop", 1), small_config(scheme, count)
    tokens = random_tokens(plain, B, T)
    params = random_params(plain)
    gates = {
        name: 100 * value
        for name, value in random_params(looped)["layers"].items()
        if name.startswith("gate")
    }
    with_gates = {**params, "layers": params["layers"] | gates}
    logits, states = forward_with_states(plain)(params, tokens, SEGMENTS)
    looped_logits, looped_states = forward_with_states(looped)(with_gates, tokens, SEGMENTS)
    np.testing.assert_array_equal(looped_logits, logits)
    np.testing.assert_array_equal(looped_states.hidden_LBTD, states.hidden_LBTD)


# ---- gradients ----


def loss(logits, tokens):
    return jnp.mean(cross_entropy(logits[:, :-1], tokens[:, 1:])[0])


@functools.cache
def gradients(config: ModelConfig, segment_ids: bytes):
    """Logits, and the gradients of a loss with respect to all parameters."""
    tokens, packing = random_tokens(config, B, T), np.frombuffer(segment_ids, int).reshape(B, T)

    def loss_and_logits(params):
        logits = Transformer(config).apply({"params": params}, tokens, packing)
        return loss(logits, tokens), logits

    grads, logits = jax.jit(jax.grad(loss_and_logits, has_aux=True))(random_params(config))
    return logits, grads


def check_gradients(actual, expected, tolerance):
    """Each parameter's gradients agree within a share of the largest of them."""

    def check(path, gradient, right):
        scale = np.max(np.abs(right))
        assert scale > 1e-5, f"{path} has no gradient to compare"
        assert largest_difference(gradient, right) < tolerance * scale, path

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.slow(reason="compiles every scheme's gradient")
@pytest.mark.parametrize(
    "config",
    [
        *(small_config(scheme, 1 if scheme == "no_loop" else 3) for scheme in reference.SCHEMES),
        VARIANTS["one_key_head"],
    ],
    ids=lambda config: f"{config.loop.scheme}-{config.loop.count}",
)
def test_gradients(config):
    """Through every loop, and through the keys and values that loops share."""
    tokens = random_tokens(config, B, T)
    expected = jax.grad(
        lambda params: loss(
            reference.forward(reference_settings(config), params, tokens, SEGMENTS)["logits"],
            tokens,
        )
    )(random_params(config))
    check_gradients(gradients(config, SEGMENTS.tobytes())[1], expected, TOLERANCE)


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize(
    "settings",
    [
        {"layer_unroll": 2},
        {"remat": "full"},
        {"remat": "dots", "layer_unroll": 2},
        {"remat": "attention"},
        {"remat": "dots_and_attention"},
    ],
    ids=lambda settings: "-".join(f"{name}-{value}" for name, value in settings.items()),
)
def test_unrolled_and_recomputed_layers_are_the_same_model(settings):
    expected, expected_gradients = gradients(small_config("plt", 3), SEGMENTS.tobytes())
    logits, actual = gradients(small_config("plt", 3, **settings), SEGMENTS.tobytes())
    assert largest_difference(logits, expected) < 1e-5
    check_gradients(actual, expected_gradients, 1e-5)


def test_recomputation_keeps_less_for_the_backward_pass():
    """What each setting of remat is for, on the numbers kept between the passes."""
    kept = {}
    for remat in ("none", "dots", "full"):
        config = small_config("plt", 3, remat=remat)
        tokens = random_tokens(config, B, T)
        backward = functools.partial(jax.vjp, forward_of(config, tokens))
        _, pullback = jax.eval_shape(backward, random_params(config))
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept["full"] < kept["dots"] < kept["none"]


@pytest.mark.parametrize(("unroll", "kept"), [(1, False), (2, True)])
def test_recomputation_is_kept_apart_where_no_scan_does_it(unroll, kept):
    config = small_config("plt", 2, remat="full", layer_unroll=unroll)
    program = jax.make_jaxpr(forward_of(config, random_tokens(config, B, T)))
    text = str(program(random_params(config)))
    assert "prevent_cse=" in text and f"prevent_cse={not kept}" not in text


def test_a_layer_is_traced_once_for_the_first_loop_and_once_for_all_later_ones(monkeypatch):
    traced = []

    def counting(*inputs, **settings):
        traced.append(inputs)
        return apply_block(*inputs, **settings)

    monkeypatch.setattr(block, "apply_block", counting)
    config = small_config("plt", 4, layers=3)
    jax.eval_shape(forward_of(config, random_tokens(config, B, T)), random_params(config))
    assert len(traced) == 2


def forward_of(config, tokens):
    return lambda params: Transformer(config).apply({"params": params}, tokens)


# ---- bfloat16 ----


@pytest.mark.slow(reason="compiles every scheme twice")
@pytest.mark.parametrize("scheme", ["plt", "vanilla_loop"])
def test_bfloat16_is_near_float32(scheme):
    """Within 5 % of the logits' spread; bfloat16 has 8 bits, each layer rounds a few times."""
    exact, rounded = small_config(scheme, 3), small_config(scheme, 3, dtype="bfloat16")
    params, tokens = random_params(exact), random_tokens(exact, B, T)
    expected = forward_with_states(exact)(params, tokens, SEGMENTS)[0]
    logits, states = forward_with_states(rounded)(params, tokens, SEGMENTS)
    assert logits.dtype == jnp.float32
    assert states.hidden_LBTD.dtype == states.output_LBTD.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((np.asarray(logits) - expected) ** 2)) / np.std(expected)
    assert 1e-4 < error < 0.05


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("count", [1, 3])
def test_a_model_runs_with_other_numbers_of_loops(count):
    moe = {"experts": 3, "expert_width": 5, "bias_update_rate": 0.1}
    trained, wanted = (small_config("plt", loops, moe=moe) for loops in (2, count))
    params = random_params(trained)
    bias_JLX = jnp.arange(12.0).reshape(2, 2, 3)
    params = params | {"layers": params["layers"] | {"router_bias": bias_JLX}}
    config, own = with_loops(trained, params, count)
    assert config == wanted
    own_JLX = own["layers"]["router_bias"]
    assert own_JLX.shape == (2, count, 3)
    np.testing.assert_array_equal(own_JLX[:, -1], bias_JLX[:, min(count, 2) - 1])
    tokens = random_tokens(config, B, T)
    _, states = forward_with_states(config)(own, tokens, None, None)
    _, before = forward_with_states(trained)(params, tokens, None, None)
    np.testing.assert_array_equal(states.hidden_LBTD[0], before.hidden_LBTD[0])


def test_one_loop_only_stays_one():
    config = small_config("no_loop", 1)
    assert with_loops(config, random_params(config), 1)[0] == config
    with pytest.raises(InputError, match="no_loop cannot run 2 loops; give 1"):
        with_loops(config, random_params(config), 2)


@pytest.mark.slow(reason="compiles several programs")
def test_a_window_wider_than_any_sequence_sees_all_of_it():
    tokens = jnp.arange(12).reshape(1, 12)
    params = random_params(small_config())
    wide, just = (
        Transformer(small_config(window=window)).apply({"params": params}, tokens)
        for window in (2**31 - 1, 12)
    )
    np.testing.assert_array_equal(wide, just)
