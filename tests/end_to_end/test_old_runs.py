"""Run directories of an older version resume, evaluate and decode with the numbers of that version.

tests/golden/runs_of_547d837/README.md describes the runs and what is expected of them.
"""

import functools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import plt_jax
from plt_jax.config.yaml_file import dump_config, load_resolved
from plt_jax.runs.directory import open_trained
from tests.models import forward
from tests.training.runs import command, json_rows

RUNS = Path(__file__).parents[1] / "golden" / "runs_of_547d837"
NAMES = ("dense", "experts", "permutations")


@functools.cache
def expected_numbers():
    return json.loads((RUNS / "expected.json").read_text())


@functools.cache
def expected_logits():
    with np.load(RUNS / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the runs and their inputs. It is the working directory, because the paths in the
    runs' configurations are relative."""
    copy = tmp_path / "runs"
    shutil.copytree(RUNS, copy)
    monkeypatch.chdir(copy)
    return copy


def assert_same_numbers(found, expected, tolerance=1e-6):
    """Compares nested numbers; a name that is not expected may have been added since."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            # Gradient norms sum over all parameters, in an order that the compiler chooses.
            assert_same_numbers(found[name], value, 2e-5 if name == "gradient_norm" else tolerance)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same_numbers(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance)
    else:
        assert found == expected


def assert_same_logits(found, name):
    """Compares every fifth logit, which is what the files hold."""
    np.testing.assert_allclose(found[..., ::5], expected_logits()[name], rtol=0, atol=1e-5)


@pytest.mark.slow(reason="compiles the training programs of three models")
@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_resumes(folder, name, step):
    if step == 4:
        shutil.rmtree(folder / name / "checkpoints" / "8")
    # The same configuration, with the names that its fields have now.
    config = load_resolved(folder / name / "config.yaml")
    (folder / "resumed.yaml").write_text(dump_config(config))
    result = command("train.py", "resumed.yaml", "--training.steps", step + 4)
    assert result.code == 0, result
    assert f"resuming at step {step} of {step + 4}" in result.out
    rows = json_rows(folder / name / "metrics.jsonl")
    new = [row for row in rows if step < row["step"] <= step + 4]
    assert_same_numbers(new, expected_numbers()[name][f"resumed_at_{step}"])


@pytest.mark.slow(reason="compiles the programs of two old runs")
@pytest.mark.parametrize("name", NAMES)
def test_evaluates(folder, name):
    result = command("eval.py", name)
    assert (result.code, result.err) == (0, ""), result
    found = json.loads((folder / name / "eval.json").read_text())
    expected = expected_numbers()[name]["evaluation"]
    del expected["text"]  # a description for people
    assert_same_numbers(found, expected)


@pytest.mark.slow(reason="compiles the programs of two old runs")
@pytest.mark.parametrize("name", NAMES)
def test_decodes(name):
    trained = open_trained(RUNS / name)
    config, expected = trained.config.model, expected_numbers()[name]
    prompts, greedy = jnp.array(expected["prompts"]), np.array(expected["greedy"])
    rows, length = prompts.shape
    params = plt_jax.prepare_for_decode(config, trained.params)
    cache = plt_jax.init_cache(config, rows, length + greedy.shape[1])
    logits, cache = plt_jax.prefill(config, params, prompts, jnp.full(rows, length), cache)
    decoded = []
    for column in greedy.T:
        decoded.append(logits)
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), column)
        logits, cache = plt_jax.decode_step(config, params, jnp.asarray(column), cache)
    assert_same_logits(jnp.stack(decoded, axis=1), f"{name}_decoded")


@pytest.mark.parametrize("name", NAMES)
def test_forward_pass(name):
    trained = open_trained(RUNS / name)
    expected = expected_numbers()[name]
    tokens = jnp.array(np.concatenate([expected["prompts"], expected["greedy"]], axis=1))
    logits = forward(trained.config.model)(trained.params, tokens)
    assert_same_logits(logits, f"{name}_forward")
