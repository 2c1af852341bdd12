"""The diagnostics of loops: their forward pass is the model's, and what eval.py --loops writes."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import Transformer
from plt_jax.config import ModelConfig
from plt_jax.evaluation.loops import measure, run_loops
from plt_jax.evaluation.perplexity import losses_by_loop
from plt_jax.model.looping import with_loops
from plt_jax.model.transformer import number_documents, positions_in_documents
from tests import reference
from tests.models import random_params, random_tokens, reference_settings, small_config
from tests.training.runs import assert_refused, command

SCHEMES = [
    ("no_loop", 1),
    ("vanilla_loop", 2),
    ("clp", 2),
    ("clp_kv_share", 3),
    ("plt", 2),
    ("plt", 3),
    ("loop_kv_share_window", 2),
]
SEGMENTS = jnp.array([[1] * 5 + [2] * 9 + [3] * 2 + [0] * 2])
T = SEGMENTS.shape[1]


def example_of(config):
    tokens = random_tokens(config, 1, T + 1)[0]
    same = jnp.pad(SEGMENTS[0, 1:] == SEGMENTS[0, :-1], (0, 1)) & (SEGMENTS[0] > 0)
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "segment_ids": SEGMENTS[0],
        "weights": same.astype(jnp.float32),
    }


def model_states(config, params, tokens):
    run = partial(Transformer(config).apply, method=Transformer.loop_states)
    return jax.jit(run)({"params": params}, tokens, SEGMENTS)


@pytest.mark.slow(reason="compiles every scheme")
@pytest.mark.parametrize(("scheme", "count"), SCHEMES)
def test_the_states_and_gates_are_the_models(scheme, count):
    config = small_config(scheme, count)
    params, example = random_params(config), example_of(config)
    tokens, documents = example["tokens"][None], number_documents(SEGMENTS)
    states, maps = jax.jit(run_loops, static_argnums=0)(config, params, tokens, documents)
    expected = model_states(config, params, tokens)
    np.testing.assert_allclose(states[1:], expected.hidden_LBTD[:, 0], atol=2e-5)
    if expected.gate_LJB is not None:
        means = maps["gate"][1:].mean(-1)
        np.testing.assert_allclose(means, expected.gate_LJB[..., 0], atol=1e-5)
    entropy = np.asarray(maps["attention_entropy"])
    assert entropy.shape == (count, config.layers, T)
    # The first position of a document sees itself alone, whatever the scheme.
    np.testing.assert_allclose(entropy[:, :, [0, 5, 14]], 0.0, atol=1e-5)


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("scheme", ["plt", "vanilla_loop"])
def test_loops_over_part_of_the_stack(scheme):
    config = small_config(scheme, 2, layers=4, first_layer=1, last_layer=2)
    params, example = random_params(config), example_of(config)
    tokens, documents = example["tokens"][None], number_documents(SEGMENTS)
    states, maps = run_loops(config, params, tokens, documents)
    expected = model_states(config, params, tokens)
    np.testing.assert_allclose(states[1:], expected.hidden_LBTD[:, 0], atol=2e-5)
    assert maps["attention_entropy"].shape == (2, 2, T)
    values = jax.device_get(measure(config, params, example))
    batch = jax.tree.map(lambda x: x[None], example)
    losses = losses_by_loop(config, params, batch) / example["weights"].sum()
    np.testing.assert_allclose(values["loss"], losses, atol=1e-5)
    assert np.isfinite(values["fixed_point_gap"]).all()


@pytest.mark.slow(reason="compiles several programs")
def test_the_exit_gates_distribution():
    config = small_config("vanilla_loop", 3, exit_gate=True)
    params, example = random_params(config), example_of(config)
    values = jax.device_get(measure(config, params, example))
    hidden = np.asarray(model_states(config, params, example["tokens"][None]).hidden_LBTD[:, 0])
    rms = np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + config.norm_epsilon)
    score = hidden / rms * params["final_norm"] @ params["exit_gate"] + params["exit_gate_bias"]
    first, second, _ = 1 / (1 + np.exp(-np.asarray(score)[..., 0]))
    exits = [first, (1 - first) * second, (1 - first) * (1 - second)]
    counted = np.asarray(example["weights"]) > 0
    np.testing.assert_allclose(values["exit"], [one[counted].mean() for one in exits], atol=1e-5)


@pytest.mark.slow(reason="compiles several programs")
def test_experts_and_leading_dense_layers():
    config = small_config(
        "plt",
        layers=3,
        moe={"experts": 4, "expert_width": 8, "dense_layers": 1, "bias_update_rate": 0.1},
    )
    params, example = random_params(config), example_of(config)
    tokens, documents = example["tokens"][None], number_documents(SEGMENTS)
    states, maps = run_loops(*with_loops(config, params, 3), tokens, documents)
    expected = model_states(config, params, tokens)
    np.testing.assert_allclose(states[1:3], expected.hidden_LBTD[:, 0], atol=2e-5)
    assert maps["head_rank"].shape == (3, 3, T)


@pytest.mark.slow(reason="compiles several programs")
def test_what_is_measured_of_a_model():
    config = small_config("plt", 2)
    params, example = random_params(config), example_of(config)
    values = jax.device_get(measure(config, params, example))
    batch = jax.tree.map(lambda x: x[None], example)
    losses = losses_by_loop(config, params, batch) / example["weights"].sum()
    np.testing.assert_allclose(values["loss"], losses, atol=1e-5)
    # The gap behind the last loop is the step of one more.
    more = ModelConfig(**config.model_dump() | {"loop": config.loop.model_dump() | {"count": 3}})
    states = model_states(more, params, batch["tokens"]).hidden_LBTD[:, 0]
    counted = np.asarray(example["weights"]) > 0
    steps = np.linalg.norm(np.diff(np.asarray(states), axis=0), axis=-1)[:, counted].mean(-1)
    np.testing.assert_allclose(values["fixed_point_gap"], steps, atol=1e-4)
    np.testing.assert_allclose(values["step_size"][1], steps[0], atol=1e-4)
    first = np.asarray(states[0])
    behind = np.flatnonzero(counted[1:] & (np.diff(np.asarray(SEGMENTS[0])) == 0)) + 1
    offset = np.linalg.norm(first[behind] - first[behind - 1], axis=-1).mean()
    assert values["offset_cost"][1] == pytest.approx(offset, rel=1e-4)
    assert "exit" not in values  # without a gate
    for name in ("cosine", "offset_cost", "output_shift"):
        assert np.isnan(values[name][0]) and np.isfinite(values[name][1])
    assert -1 <= values["cosine"][1] <= 1 and values["effective_rank"].min() >= 1
    assert (
        np.isnan(values["gate"][0]).all()
        and ((values["gate"][1] > 0) & (values["gate"][1] < 1)).all()
    )


def reference_maps(monkeypatch, config, params, tokens):
    """The judge's raw states h(0), h(1), ... [R+1, T, D], and of every loop and layer its attention
    [N, T, S], of both branches together, and its gates [T, N], if it has them."""
    weights, gates, maps = [], [], []
    attention, gate = reference.attention, reference.gate

    def attend(q, k, v, mask):
        each_key = jnp.broadcast_to(jnp.eye(T)[None, :, None], (1, T, k.shape[2], T))
        weights.append(np.asarray(attention(q, k, each_key, mask)[0], np.float64))
        return attention(q, k, v, mask)

    def remember(*arguments):
        gates.append(gate(*arguments))
        return gates[-1]

    monkeypatch.setattr(reference, "attention", attend)
    monkeypatch.setattr(reference, "gate", remember)
    result = reference.forward(reference_settings(config), params, tokens, SEGMENTS)
    for _ in range(config.layers):
        maps.append((weights.pop(0).swapaxes(0, 1), None))
    while weights and not gates:
        maps.append((weights.pop(0).swapaxes(0, 1), None))
    for own in gates:
        share_TN1 = np.asarray(own[0], np.float64)[:, :, None]
        near, far = weights.pop(0), weights.pop(0)
        maps.append(((share_TN1 * far + (1 - share_TN1) * near).swapaxes(0, 1), share_TN1[..., 0]))
    embedded = params["embedding"][tokens]
    states = np.array([one[0] for one in (embedded, *result["raw_loops"])], np.float64)
    J = config.layers
    return states, [maps[J * index : J * (index + 1)] for index in range(config.loop.count)]


def rank_of(matrix):
    """exp of the entropy of its singular values' shares."""
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values[values > 1e-9] / values.sum()
    return np.exp(-(share * np.log(share)).sum())


def divergence(p, q):
    """KL in nats along the last axis, where p is 0 nothing."""
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1)


@pytest.mark.slow(reason="compiles every scheme")
@pytest.mark.parametrize("scheme", ["plt", "vanilla_loop", "clp_kv_share"])
def test_every_measure_by_its_definition_on_the_judges_states_and_maps(monkeypatch, scheme):
    config = small_config(scheme, 3)
    params, example = random_params(config), example_of(config)
    found = jax.device_get(measure(config, params, example))
    longer = with_loops(config, params, 4)
    states, maps = reference_maps(monkeypatch, *longer, example["tokens"][None])
    targets, here = np.asarray(example["targets"]), np.asarray(example["weights"]) > 0
    head = np.asarray(params["head"] if "head" in params else params["embedding"].T, np.float64)
    scale = np.asarray(params["final_norm"], np.float64)
    rms = np.sqrt((states**2).mean(-1, keepdims=True))
    normed = states / np.sqrt((states**2).mean(-1, keepdims=True) + config.norm_epsilon)
    p = np.exp(normed * scale @ head)
    p /= p.sum(-1, keepdims=True)
    documents = np.asarray(number_documents(SEGMENTS))[0]
    behind = here & np.concatenate([[False], documents[1:] == documents[:-1]])
    moved = np.diff(states, axis=0)  # moved[r - 1] is what loop r does
    length = np.linalg.norm(moved, axis=-1)
    place = np.arange(T)
    positions = np.asarray(positions_in_documents(number_documents(SEGMENTS)))[0]

    for r in (1, 2, 3):

        def is_found(name, expected, r=r):
            np.testing.assert_allclose(
                found[name][r - 1], expected, rtol=2e-3, atol=2e-4, err_msg=f"{name} {r}"
            )

        is_found("loss", -np.log(p[r, place, targets])[here].mean())
        is_found("step_size", length[r - 1][here].mean())
        is_found("fixed_point_gap", length[r][here].mean())
        is_found("effective_rank", rank_of((states[r] / rms[r])[here]))
        is_found("entropy", -(p[r] * np.log(p[r])).sum(-1)[here].mean())
        better = (p[r] > p[r, place, targets][:, None]).sum(-1)
        is_found("true_rank", 1 + better[here].mean())
        for j, (attention, gates) in enumerate(maps[r - 1]):
            by_query = attention.swapaxes(0, 1)[here]
            entropy = -np.where(attention > 0, attention * np.log(attention + 1e-300), 0).sum(-1)
            unit = by_query / np.linalg.norm(by_query, axis=-1, keepdims=True)
            pairs = np.triu_indices(config.heads, 1)
            cosines = [(one @ one.T)[pairs].mean() for one in unit]
            is_found_layer = {
                "attention_entropy": entropy.mean(0)[here].mean(),
                "head_rank": np.mean([rank_of(one) for one in by_query]),
                "head_cosine": np.mean(cosines),
            }
            if gates is not None:
                is_found_layer["gate"] = gates[here].mean()
            if r > 1:
                change = divergence(attention, maps[r - 2][j][0])
                is_found_layer["attention_change"] = change.mean(0)[here].mean()
            for name, expected in is_found_layer.items():
                np.testing.assert_allclose(
                    found[name][r - 1, j], expected, rtol=2e-3, atol=2e-4, err_msg=name
                )
        if r > 1:
            # Under the shift loop r has nothing new to read at a document's first r - 1 positions.
            new = (positions >= r - 1) | (scheme == "vanilla_loop")
            np.testing.assert_allclose(length[r - 1][~new], 0, atol=1e-5)
            both = np.where(new, length[r - 1] * length[r - 2], np.inf)
            turns = (moved[r - 1] * moved[r - 2]).sum(-1) / both
            is_found("cosine", turns[here & new].mean())
            apart = np.linalg.norm(np.diff(states[r - 1], axis=0), axis=-1)
            is_found("offset_cost", apart[behind[1:]].mean())
            is_found("output_shift", divergence(p[r], p[r - 1])[here].mean())


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished.directory, tmp_path / "copy")


def test_eval_writes_the_numbers_and_a_page(copy):
    result = command("eval.py", copy, "--loops", "--sequences", "3")
    assert result.code == 0 and result.err == ""
    numbers = json.loads((copy / "loops.json").read_text())
    assert [row["loop"] for row in numbers["by_loop"]] == [1, 2]
    assert numbers["most_shifting_loop"] == 2 and numbers["sequences"] == 3
    assert np.shape(numbers["by_layer"]["gate"]) == (1, 2)
    assert np.shape(numbers["by_layer"]["attention_entropy"]) == (2, 2)
    lines = {line[:17].strip(): line[17:].split() for line in result.out.splitlines()[:-1]}
    assert float(lines["loss"][1]) == pytest.approx(numbers["by_loop"][1]["loss"], abs=1e-4)
    page = (copy / "loops.html").read_text()
    assert page.count("<svg") == 5 and "fixed-point gap" in page
    assert result.out.splitlines()[-1] == f"written to {copy / 'loops.html'}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loops", "--sequences", "0"], "--sequences is 0; it must be at least 1"),
        (["--sequences", "3"], "--sequences is for --loops"),
        (["--loops", "--batch_size", "2"], "--batch_size is for scores, --exact_match, --by_doc"),
        (["--loops", "--by_document"], "--by_document and --loops exclude one another"),
        (["--loops", "--limit", "2"], "--limit is for --exact_match, --by_document, --tasks"),
        (["--loops", "--text", "/no/where"], "/no/where"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(copy, words, message):
    assert_refused(command("eval.py", copy, *words), message)
    assert not (copy / "loops.json").exists()
