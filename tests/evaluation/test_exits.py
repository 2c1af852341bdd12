"""Early exit: the loops that each token needs, against NumPy and the published Ouro code."""

import json
from pathlib import Path

import numpy as np
import pytest

from plt_jax import InputError, Transformer
from plt_jax.evaluation import exits
from plt_jax.evaluation.exits import (
    ExitRule,
    LoopPredictions,
    evaluate_exits,
    loops_needed,
    parse_rules,
    predict,
)
from plt_jax.evaluation.scores import evaluate_trained
from tests.golden.test_looped_types import OURO
from tests.golden.test_model import read
from tests.models import random_params, small_config
from tests.training.runs import finished_run
from tests.training.test_step import make_batch

GATED = small_config("vanilla_loop", 3, layers=1, exit_gate=True, exit_threshold=0.7)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("at_once", [2**25, 7 * 3 * 31], ids=["one block", "blocks of seven"])
def test_predictions_are_those_of_all_logits(monkeypatch, at_once):
    monkeypatch.setattr(exits, "LOGITS", at_once)
    predict.clear_cache()
    batch = make_batch(rows=2)
    params = random_params(GATED)
    found = predict(GATED, params, batch)
    logits = Transformer(GATED).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], method="logits_by_loop"
    )
    logs_LMV = log_softmax(logits).reshape(3, -1, 31)
    targets_M = batch["targets"].reshape(-1)
    nats_LM = -logs_LMV[:, np.arange(len(targets_M)), targets_M]
    np.testing.assert_allclose(found.nats, nats_LM.T, atol=1e-4)
    entropy_LM = -(np.exp(logs_LMV) * logs_LMV).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy_LM.T, atol=1e-4)
    kl_LM = (np.exp(logs_LMV[1:]) * (logs_LMV[1:] - logs_LMV[:-1])).sum(-1)
    np.testing.assert_allclose(found.kl[:, 1:], kl_LM.T, atol=1e-4)
    assert np.isinf(found.kl[:, 0]).all()
    np.testing.assert_array_equal(found.best, logs_LMV.argmax(-1).T)
    assert ((np.diff(found.exited, axis=1) >= 0) & (found.exited[:, 1:] > 0)).all()
    np.testing.assert_allclose(found.exited[:, -1], 1.0, atol=1e-6)


def test_the_first_loop_at_which_a_rule_holds_is_the_last():
    nothing = np.zeros((4, 3))
    predictions = LoopPredictions(
        nats=nothing,
        entropy=np.array([[0.1, 9, 9], [9, 0.1, 0.1], [9, 9, 0.1], [9, 9, 9]]),
        kl=np.array([[np.inf, 0.1, 9], [np.inf, 9, 0.1], [np.inf, 9, 9], [np.inf, 0.1, 0.1]]),
        best=nothing,
        exited=np.array([[0.5, 0.6, 1], [0.2, 0.5, 1], [0.2, 0.3, 1], [0.9, 0.95, 1]]),
    )
    assert loops_needed(ExitRule("entropy", 1.0), predictions).tolist() == [1, 2, 3, 3]
    assert loops_needed(ExitRule("kl", 1.0), predictions).tolist() == [2, 3, 3, 2]
    assert loops_needed(ExitRule("gate", 0.5), predictions).tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("folder", OURO, ids=lambda folder: folder.name)
def test_the_gate_exits_where_the_published_code_does(folder):
    _, config, params, expected = read(folder)
    tokens = expected["input_ids"]
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": np.zeros_like(tokens)}
    loops = loops_needed(
        ExitRule("gate", 0.6), LoopPredictions(*map(np.asarray, predict(config, params, batch)))
    )
    assert len(np.unique(loops)) > 1
    at = loops.reshape(tokens.shape) - 1
    chosen = np.take_along_axis(expected["logits"], at[None, :, :, None], axis=0)[0]
    np.testing.assert_array_equal(chosen, expected["exited"])


def test_rules_are_read_with_the_gates_own_threshold():
    rules = parse_rules("kl:0.01, entropy:2,gate,gate:0.5", GATED)
    expected = [("kl", 0.01), ("entropy", 2.0), ("gate", 0.7), ("gate", 0.5)]
    assert rules == [ExitRule(*one) for one in expected]
    assert str(rules[0]) == "kl:0.01"


@pytest.mark.parametrize(
    ("rules", "config", "message"),
    [
        ("kl", GATED, "'kl' is no rule; give kl:NUMBER"),
        ("kl:0", GATED, "with a number above 0"),
        ("kl:nan", GATED, "with a number above 0"),
        ("entropy:x", GATED, "'entropy:x' is no rule"),
        ("", GATED, "'' is no rule"),
        ("patience:3", GATED, "'patience:3' is no rule"),
        ("gate", small_config("plt"), "'gate' needs a model with an exit gate"),
        ("kl:1", small_config("no_loop", 1), "no_loop runs one"),
    ],
)
def test_rules_that_say_nothing_are_refused(rules, config, message):
    with pytest.raises(InputError) as refusal:
        parse_rules(rules, config)
    assert message in str(refusal.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    finished = finished_run(tmp_path_factory.mktemp("exits"))
    return finished.copy(tmp_path_factory.mktemp("copy") / "run").directory


@pytest.mark.slow(reason="trains a run")
def test_a_run_is_measured(run):
    report = evaluate_exits(str(run), "kl:1e9,kl:1e-30,entropy:3,entropy:1e9")
    scores = evaluate_trained(str(run)).numbers
    numbers = json.loads(report.path.read_text())
    assert numbers["tokens"] == scores["tokens"]
    for found, right in zip(numbers["by_loop"], scores["by_loop"], strict=True):
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(right["bits_per_byte"], rel=1e-5)
    always, never, some, first = numbers["rules"]
    assert first["share_by_loop"] == [1.0, 0.0] and first["mean_loops"] == 1.0
    assert first["loss"] == pytest.approx(scores["by_loop"][0]["loss"], rel=1e-5)
    assert first["same_token"] < 1.0
    assert scores["by_loop"][0]["loss"] != pytest.approx(scores["loss"], rel=1e-4)
    assert always["share_by_loop"] == never["share_by_loop"] == [0.0, 1.0]  # two loops
    assert never["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    assert never["same_token"] == 1.0
    assert sum(some["share_by_loop"]) == pytest.approx(1.0)
    assert 1.0 <= some["mean_loops"] <= 2.0
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "all",
        "kl:1e+09",
        "kl:1e-30",
        "entropy:3",
        "entropy:1e+09",
        "note:",
    ]
    assert f"{scores['loss']:.4f}" in lines[1] and "in one pass" in lines[-1]


def test_a_text_without_targets_is_refused(run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError):
        evaluate_exits(str(run), "kl:1", text=str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match="--batch_size is 0"):
        evaluate_exits(str(run), "kl:1", batch_size=0)
