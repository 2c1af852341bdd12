"""Decode steps that stop their loops early are those of the reference with the same loops."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import InputError, generate, init_cache, prefill, prepare_for_decode
from plt_jax.decoding.early_exit import ExitRule, check_rule, parse_rule, run_until_exit
from plt_jax.decoding.generation import GenerationRequest, TokenStream, advance, generate_all
from plt_jax.decoding.ops import Norms
from plt_jax.decoding.step import step_logits, step_until_exit
from plt_jax.runs.directory import open_trained
from plt_jax.training import trainer
from tests import reference
from tests.models import random_params, random_tokens, reference_settings, small_config
from tests.training.runs import command, make_home, output_of, tiny_config

LENGTHS = np.array([5, 2, 7])
STEPS = 9
CASES = {
    "vanilla-2": small_config("vanilla_loop", 2, exit_gate=True),
    "vanilla-4": small_config("vanilla_loop", 4, exit_gate=True, tied_embeddings=True),
    "vanilla-3-raw": small_config("vanilla_loop", 3, normalize_between_loops=False),
    "window-2": small_config("loop_kv_share_window", 2, window=3),
    "window-4": small_config("loop_kv_share_window", 4, window=3, exit_gate=True),
    "vanilla-3-of-the-middle": small_config(
        "vanilla_loop", 3, layers=4, first_layer=1, last_layer=2, exit_gate=True
    ),
    "vanilla-2-of-experts": small_config(
        "vanilla_loop", 2, moe={"experts": 4, "experts_per_token": 2, "expert_width": 8}
    ),
}
RULES = [
    (name, kind)
    for name, config in CASES.items()
    for kind in ("entropy", "kl", "gate")
    if (kind == "gate" and config.loop.exit_gate)
    or (kind == "entropy" and not config.has_coda)
    or (kind == "kl" and not config.has_coda and config.loop.count > 2)
]
step = jax.jit(step_until_exit, static_argnums=0)


def decode(config, rule, tokens_BT, rows=slice(None)):
    """Prefills and then decodes given tokens: the logits [B, n, V] and the loops [B, n]."""
    lengths, tokens_BT = LENGTHS[rows], tokens_BT[rows]
    weights = prepare_for_decode(config, random_params(config))
    cache = init_cache(config, len(lengths), 32)
    _, cache = prefill(config, weights, tokens_BT[:, : max(lengths)], lengths, cache)
    logits, loops = [], []
    for n in range(STEPS):
        newest_B = tokens_BT[np.arange(len(lengths)), lengths + n]
        running_B = jnp.ones(len(lengths), bool)
        logits_BV, cache, loops_B = step(config, weights, rule, newest_B, cache, running_B)
        logits.append(logits_BV)
        loops.append(loops_B)
    return np.stack(logits, 1), np.stack(loops, 1)


@functools.cache
def tokens_of(config):
    return np.asarray(random_tokens(config, len(LENGTHS), max(LENGTHS) + STEPS + 1))


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float64)))


def measures(config, kind, readouts, raw):
    """By loop, what a rule compares with its threshold, [L, B, T], from the reference's states."""
    params = random_params(config)
    if kind == "gate":
        norm = params["loop_norm" if config.has_coda else "final_norm"]
        leaves = [
            jax.nn.sigmoid(
                (reference.rms_norm(state, norm, config.norm_epsilon) @ params["exit_gate"])[..., 0]
                + params["exit_gate_bias"]
            )
            for state in raw
        ]
        return 1 - np.cumprod(1 - np.stack(leaves), axis=0)
    head = params["embedding"].T if config.tied_embeddings else params["head"]
    logs = log_softmax(np.stack(readouts) @ np.asarray(head))
    if kind == "entropy":
        return -(np.exp(logs) * logs).sum(-1)
    kl = (np.exp(logs[1:]) * (logs[1:] - logs[:-1])).sum(-1)
    return np.concatenate([np.full_like(kl[:1], np.inf), kl])


def threshold_of(config, kind):
    """A threshold at which about a half of the tokens exits somewhere, far from all of theirs."""
    states = reference.forward(reference_settings(config), random_params(config), tokens_of(config))
    found = measures(config, kind, states["readouts"], states["raw_loops"])
    values = np.sort(found[:-1][np.isfinite(found[:-1])].ravel())
    middle = values[len(values) // 3 : -len(values) // 3]
    widest = np.diff(middle).argmax()
    return float(middle[widest : widest + 2].mean())


@pytest.mark.parametrize(("name", "kind"), RULES, ids=[f"{n}-{k}" for n, k in RULES])
def test_steps_are_those_of_the_reference_and_end_at_the_first_loop_that_the_rule_allows(
    name, kind
):
    config, tokens_BT = CASES[name], tokens_of(CASES[name])
    rule = ExitRule(kind, threshold_of(config, kind))
    logits_BnV, loops_Bn = decode(config, rule, tokens_BT)
    assert len(np.unique(loops_Bn)) > 1
    rows = np.arange(len(LENGTHS))[:, None]
    at_Bn = LENGTHS[:, None] + np.arange(STEPS)
    exits_BT = np.full(tokens_BT.shape, config.loop.count)
    exits_BT[rows, at_Bn] = loops_Bn
    params = random_params(config)
    states = reference.forward(reference_settings(config), params, tokens_BT, exits=exits_BT)
    np.testing.assert_allclose(logits_BnV, states["logits"][rows, at_Bn], atol=2e-4)
    found = measures(config, kind, states["readouts"], states["raw_loops"])[:, rows, at_Bn]
    for row, column in np.ndindex(loops_Bn.shape):
        values, loops = found[:, row, column], loops_Bn[row, column]
        holds = values >= rule.threshold if kind == "gate" else values < rule.threshold
        assert not holds[: loops - 1].any()
        assert holds[loops - 1] or loops == config.loop.count


@pytest.mark.parametrize("name", ["vanilla-4", "window-4"])
def test_a_sequence_does_not_depend_on_the_others(name):
    config = CASES[name]
    rule = ExitRule("entropy", threshold_of(config, "entropy"))
    logits_BnV, loops_Bn = decode(config, rule, tokens_of(config))
    for row in range(len(LENGTHS)):
        alone, loops = decode(config, rule, tokens_of(config), rows=slice(row, row + 1))
        np.testing.assert_allclose(alone[0], logits_BnV[row], atol=1e-5)
        np.testing.assert_array_equal(loops[0], loops_Bn[row])


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["vanilla-4", "window-4", "vanilla-3-of-the-middle"])
def test_a_rule_that_never_holds_changes_nothing(name, cache_dtype):
    config = CASES[name]
    rule = ExitRule("gate", 1.0)  # no gate is certain
    weights = prepare_for_decode(config, random_params(config))
    tokens_BT = tokens_of(config)
    cache = init_cache(config, len(LENGTHS), 32, cache_dtype)
    _, cache = prefill(config, weights, tokens_BT[:, :7], LENGTHS, cache)
    found, one, loops_B = step(config, weights, rule, tokens_BT[:, 7], cache, jnp.ones(3, bool))
    plain = jax.jit(step_logits, static_argnums=0)
    expected, other = plain(config, weights, tokens_BT[:, 7], cache)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one, other)
    assert loops_B.tolist() == [config.loop.count] * 3


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["vanilla-4", "window-4"])
def test_the_loops_that_were_left_out_have_the_last_ones_keys_and_values(name, cache_dtype):
    config = CASES[name]
    weights = prepare_for_decode(config, random_params(config))
    cache = init_cache(config, 1, 8, cache_dtype)
    for token in (3, 5):
        _, cache, loops_B = step(
            config, weights, ExitRule("entropy", 1e9), np.array([token]), cache, jnp.ones(1, bool)
        )
        assert loops_B.tolist() == [1]
    slots, own = cache.slots, config.loop.later_attention == "own"
    for stored in (*cache.keys, *cache.values):
        for array in jax.tree.leaves(stored[0]):
            assert np.any(np.asarray(array)[:, :, :2] != 0)
        for loop in range(1, config.loop.count):
            for position in (0, 1):
                at = position if own else int(slots.of(loop, jnp.array(position)))
                one, other = (
                    jax.tree.map(lambda array, at=slot: array[:, :, at], stored[index])
                    for index, slot in ((0, position), (loop if own else 0, at))
                )
                jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("entropy", "loops"), [(1e9, 1), (1e-30, 4)], ids=["all exit", "none"])
def test_no_further_loop_is_run_where_all_sequences_have_exited(entropy, loops):
    config = CASES["vanilla-4"]
    weights = prepare_for_decode(config, random_params(config))
    begun = []

    def run_core(indices, x_B1D, cache):
        jax.debug.callback(lambda: begun.append(indices.start), ordered=True)
        return x_B1D + 1, cache

    same = Norms(lambda x: x, lambda x: x)
    run = functools.partial(
        run_until_exit, config, weights, ExitRule("entropy", entropy), same, run_core
    )
    cache = init_cache(config, 2, 8)
    first_B1D = jnp.ones((2, 1, config.width))
    hidden_B1D, _, loops_B, _ = jax.jit(run)(first_B1D, cache, jnp.array([True, True]))
    jax.effects_barrier()
    assert begun == list(range(loops)) and loops_B.tolist() == [loops] * 2
    np.testing.assert_array_equal(hidden_B1D, 1 + loops * np.ones_like(hidden_B1D))
    begun.clear()
    jax.jit(run)(first_B1D, cache, jnp.array([False, False]))  # none matters
    jax.effects_barrier()
    assert begun == [0]


def test_generation_counts_its_loops_and_gives_what_steps_give():
    config = CASES["vanilla-4"]
    params = random_params(config)
    rule = ExitRule("entropy", threshold_of(config, "entropy"))
    prompts = [tokens_of(config)[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    made = generate_all(config, params, GenerationRequest(prompts, STEPS + 1, exit_rule=rule))
    given = np.zeros((len(LENGTHS), max(LENGTHS) + STEPS + 1), np.int32)
    for row, (length, prompt) in enumerate(zip(LENGTHS, prompts, strict=True)):
        given[row, : length + STEPS + 1] = [*prompt, *made.tokens[row]]
    logits_BnV, loops_Bn = decode(config, rule, given)
    np.testing.assert_array_equal(made.tokens[:, 1:], logits_BnV.argmax(-1))
    assert (made.decoded, made.loops) == (loops_Bn.size, loops_Bn.sum())
    assert len(np.unique(loops_Bn)) > 1
    # Rows that have stopped are not counted.
    stops = [[int(made.tokens[0, 2])], [], []]
    request = GenerationRequest(prompts, STEPS + 1, stop_tokens=stops, exit_rule=rule)
    some = generate_all(config, params, request)
    end = made.tokens[0].tolist().index(stops[0][0])
    assert some.decoded == loops_Bn.size - (STEPS - end)
    np.testing.assert_array_equal(some.tokens[1:], made.tokens[1:])
    plain = generate_all(config, params, GenerationRequest(prompts, 2))
    assert (plain.decoded, plain.loops) == (0, 0)


@pytest.mark.parametrize(
    ("config", "rule", "message"),
    [
        (small_config("plt", 2), ExitRule("entropy", 1.0), "plt decodes all loops in one pass"),
        (CASES["vanilla-2"], ExitRule("kl", 0.1), "no third loop to leave out"),
        (CASES["vanilla-2"], ExitRule("entropi", 0.5), "exit rule entropi:0.5 is no rule"),
        (CASES["vanilla-2"], ExitRule("entropy", float("nan")), "entropy:nan is no rule"),
        (CASES["window-2"], ExitRule("gate", 0.5), "needs a model with an exit gate"),
        (small_config("vanilla_loop", 1), ExitRule("entropy", 1.0), "vanilla_loop runs one"),
        (CASES["vanilla-3-of-the-middle"], ExitRule("kl", 0.1), "need the layers behind the loops"),
    ],
)
def test_rules_that_save_nothing_are_refused(config, rule, message):
    with pytest.raises(InputError, match=message):
        check_rule(config, rule)
    with pytest.raises(InputError, match=message):
        generate(config, random_params(config), [[1]], 2, exit_rule=rule)


def test_a_mesh_is_refused(monkeypatch):
    monkeypatch.setattr("plt_jax.decoding.early_exit.mesh_is_active", lambda: True)
    with pytest.raises(InputError, match="on one device alone"):
        check_rule(CASES["vanilla-4"], ExitRule("gate", 0.5))


def test_the_gates_threshold_is_the_configurations():
    config = small_config("vanilla_loop", 2, exit_gate=True, exit_threshold=0.3)
    assert parse_rule("gate", config) == ExitRule("gate", 0.3)


@pytest.mark.slow(reason="trains a run")
def test_the_command_ends_loops_by_a_rule(tmp_path):
    home = make_home(tmp_path)
    config = tiny_config(home, home / "run", model={"loop": {"scheme": "vanilla_loop"}})
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(config)
    words = ["plt_jax.generate", home / "run", "--prompt", "the", "--max_new_tokens", 6]
    trained = open_trained(home / "run")
    prompt = trained.tokenizer.encode_prompt("the")

    def expected(rule):
        request = GenerationRequest([prompt], 6, exit_rule=rule)
        (tokens,) = generate_all(trained.config.model, trained.params, request).tokens
        return "the" + trained.tokenizer.decode_continuation(prompt, tokens.tolist()) + "\n"

    assert output_of(*words) == expected(None)
    never = command(*words, "--exit", "entropy:1e-30")
    always = command(*words, "--exit", "entropy:1e30")
    assert never.out == expected(None)
    assert always.out == expected(ExitRule("entropy", 1e30)) != never.out
    # The first of the six is read off the prompt, whose tokens run all loops.
    assert (never.err, always.err) == ("2.00 of 2 loops a token\n", "1.00 of 2 loops a token\n")


def test_a_rule_with_an_array_can_be_used_again():
    config, rule = CASES["vanilla-2"], ExitRule("entropy", jnp.float32(0.5))
    one, other = (
        generate(config, random_params(config), [[1, 2]], 3, exit_rule=rule) for _ in range(2)
    )
    np.testing.assert_array_equal(one, other)


def test_other_thresholds_and_blocks_compile_nothing_anew():
    config = CASES["vanilla-4"]
    prompts = [tokens_of(config)[0, :3].tolist()]

    def generated(threshold):
        request = GenerationRequest(prompts, 7, exit_rule=ExitRule("entropy", threshold))
        stream = TokenStream(config, random_params(config), request)
        return len(list(stream)), stream.decoded, stream.loops

    assert generated(1e-30) == (7, 6, 24)
    programs = advance._cache_size()
    assert generated(1e30) == (7, 6, 6)
    assert advance._cache_size() == programs
