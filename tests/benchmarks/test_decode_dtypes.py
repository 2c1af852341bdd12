"""What fewer bits in a cache or in weights cost: the comparison, and the command on a run."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_dtypes
from benchmarks.decode_dtypes import beginnings, compare, predictions
from plt_jax.config.data import SyntheticConfig
from plt_jax.data.corpus import load_corpus, read_documents
from plt_jax.decoding.weights import prepare_for_decode
from plt_jax.errors import InputError
from plt_jax.runs.directory import open_trained
from tests.models import forward, random_params, random_tokens, small_config
from tests.training.runs import finished_run

pytestmark = pytest.mark.slow(reason="compiles several programs")


def test_comparison_with_known_answers():
    """Two tokens, two steps: one prediction the same, one another."""
    exact = jnp.log(jnp.array([[[0.5, 0.5]], [[0.9, 0.1]]]))
    found = jnp.log(jnp.array([[[0.5, 0.5]], [[0.2, 0.8]]]))
    figures = compare(found, exact, np.array([[0, 1, 1]]))
    divergence = 0.9 * np.log(0.9 / 0.2) + 0.1 * np.log(0.1 / 0.8)
    assert figures["nats_per_token"] == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2)
    assert figures["largest_divergence"] == pytest.approx(divergence, rel=1e-5)
    assert figures["mean_divergence"] == pytest.approx(divergence / 2, rel=1e-5)
    assert figures["same_likeliest_token"] == 0.5


def test_predictions_are_the_forward_passes():
    config = small_config("plt", 2)
    params, tokens = random_params(config), np.asarray(random_tokens(config, 3, 24))
    found = predictions(config, prepare_for_decode(config, params), tokens, "float32")
    logits = np.asarray(forward(config)(params, tokens), np.float64)
    right = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    np.testing.assert_allclose(found, right.swapaxes(0, 1)[:-1], atol=1e-4)


@pytest.fixture
def run_directory(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp()).directory


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["decode_dtypes", *map(str, words)])
    decode_dtypes.main()


def test_command(run_directory, monkeypatch, tmp_path, capsys):
    out = tmp_path / "cache.json"
    call(monkeypatch, run_directory, "--tokens", "6", "--documents", "2", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["cache_dtype"] for row in rows] == [
        *("float32", "bfloat16", "int8"),
        *("float32", "int8"),
    ]
    assert [row["weights"] for row in rows] == ["float32"] * 3 + ["int8"] * 2
    assert rows[0]["mean_divergence"] == 0 and rows[0]["same_likeliest_token"] == 1
    assert all(0 < row["mean_divergence"] < 0.01 for row in rows[1:])
    assert "int8" in capsys.readouterr().out


def test_beginnings_are_those_of_the_held_out_documents(run_directory):
    trained = open_trained(run_directory)
    documents = load_corpus(trained.config.data).validation
    for text in (None, trained.config.data.source):
        found = beginnings(trained, text, 100, 6).tolist()
        source = documents if text is None else read_documents(text)
        assert found == [trained.tokenizer.encode_prompt(document)[:6] for document in source]


def test_a_synthetic_task_has_no_documents(run_directory):
    trained = open_trained(run_directory)
    data = trained.config.data.model_copy(update={"synthetic": SyntheticConfig(task="p_hop")})
    config = trained.config.model_copy(update={"data": data})
    with pytest.raises(InputError, match="trained on a synthetic task, which has no documents"):
        beginnings(trained._replace(config=config), None, 1, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "100000"], "--tokens 100000; .* the context holds"),
        (["--documents", "0"], "--documents is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(run_directory, monkeypatch, words, message):
    with pytest.raises(InputError, match=message):
        call(monkeypatch, run_directory, *words)
