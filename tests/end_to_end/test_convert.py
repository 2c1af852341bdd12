"""Checkpoints in and out, retrofitted, and trained on, by the commands."""

import filecmp
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from plt_jax import load_huggingface
from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.runs.directory import find_checkpoint, open_trained, read_params
from tests.golden.huggingface import GOLDEN
from tests.golden.test_model import DENSE, TRANSFORMERS
from tests.golden.test_reference import CASES
from tests.training.runs import (
    assert_refused,
    command,
    finished_run,
    numbers,
    output_of,
    saved_state,
    tiny_config,
    write_config,
)

WEIGHTS = "model.safetensors"


def convert(*words):
    return output_of("plt_jax.convert", *words)


def evaluate(run):
    """The numbers of eval.json, without the step."""
    result = command("eval.py", run)
    assert result.code == 0, result
    found = json.loads((run / "eval.json").read_text())
    return {key: value for key, value in found.items() if key != "step"}


def assert_close(one, other):
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("name", [*CASES, *DENSE])
def test_a_published_checkpoint_comes_in_and_leaves_unchanged(tmp_path, name):
    source = (TRANSFORMERS if name in DENSE else GOLDEN) / name
    out = convert("import", source, tmp_path / "run")
    assert "imported " in out and f"written to {tmp_path / 'run'}" in out
    assert f"{source} has no tokenizer.json: evaluation and generation need --tokenizer" in out
    config, params = load_huggingface(source)
    found = find_checkpoint(tmp_path / "run")
    assert (found.config.model, found.step) == (config, 0)
    jax.tree.map(np.testing.assert_array_equal, read_params(found), params)
    assert "exported " in convert("export", tmp_path / "run", tmp_path / "out")
    assert filecmp.cmp(source / WEIGHTS, tmp_path / "out" / WEIGHTS, shallow=False)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert after[key] == before[key]


@pytest.mark.slow(reason="evaluates and decodes the run in several forms")
def test_a_trained_run_leaves_and_comes_back(finished, tmp_path):
    """With its tokenizer: evaluation and generation are the same."""
    convert("export", finished.directory, tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["model_type"], values["bos_token_id"], values["eos_token_id"]) == (
        *("iquestpltcoder", 0, 1),
    )
    convert("import", tmp_path / "out", tmp_path / "back")
    trained, back = open_trained(finished.directory), open_trained(tmp_path / "back")
    assert back.config.model == trained.config.model
    assert back.tokenizer.identity == trained.tokenizer.identity
    jax.tree.map(np.testing.assert_array_equal, back.params, trained.params)
    words = ["--prompt", "peace", "--max_new_tokens", "8"]
    texts = [
        command("plt_jax.generate", run, *words).out
        for run in (finished.directory, tmp_path / "back")
    ]
    assert texts[0] == texts[1] != ""
    text = finished.home / "corpus" / "00.txt"
    losses = []
    for run in (finished.directory, tmp_path / "back"):
        copy = tmp_path / f"copy of {run.name}"
        shutil.copytree(run, copy)
        assert command("eval.py", copy, "--text", text, "--batch_size", "4").code == 0
        losses.append(json.loads((copy / "eval.json").read_text())["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("words", [[], ["--by_document"], ["--loops"]], ids=" ".join)
def test_an_import_has_no_held_out_text(finished, tmp_path, words):
    convert("export", finished.directory, tmp_path / "out")
    convert("import", tmp_path / "out", tmp_path / "back")
    assert find_checkpoint(tmp_path / "back").config.data.text == "no data"
    result = command("eval.py", tmp_path / "back", *words)
    assert_refused(result, "made without data", "no held-out text", "--text FILE_OR_FOLDER")
    text = finished.home / "corpus" / "00.txt"
    result = command("eval.py", tmp_path / "back", *words, "--text", text)
    assert (result.code, result.err) == (0, "")


@pytest.mark.slow(reason="compiles several programs")
def test_half_precision_by_choice(finished, tmp_path):
    convert("export", finished.directory, tmp_path / "out", "--dtype", "bfloat16")
    convert("import", tmp_path / "out", tmp_path / "half")
    half = find_checkpoint(tmp_path / "half")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(read_params(half))} == {"bfloat16"}
    assert half.config.model.dtype == "bfloat16"
    result = command("plt_jax.generate", tmp_path / "half", "--max_new_tokens", "2")
    assert (result.code, result.err) == (0, "")
    convert("import", tmp_path / "out", tmp_path / "wide", "--dtype", "float32")
    assert find_checkpoint(tmp_path / "wide").config.model.dtype == "float32"
    convert("export", tmp_path / "half", tmp_path / "small", "--shard_gb", "1e-6")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3


def test_another_tokenizer_takes_the_place_of_the_sources(finished, tmp_path):
    """Its files, its ids, and what it was trained to do with them."""
    source = tmp_path / "source"
    convert("export", finished.directory, source)
    (source / "chat_template.jinja").write_text("{{ theirs }}")
    other = train_tokenizer(["a state of peace"] * 9, 262, 2)
    (tmp_path / "other.json").write_text(other.library.to_str())
    convert("import", source, tmp_path / "run", "--tokenizer", tmp_path / "other.json")
    assert open_trained(tmp_path / "run").tokenizer.identity == other.identity
    convert("export", tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json").identity == other.identity


def test_a_tokenizer_given_where_there_was_none_joins_the_sources_files(finished, tmp_path):
    source = tmp_path / "source"
    convert("export", finished.directory, source)
    (source / "tokenizer.json").rename(tmp_path / "made.json")
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ theirs }}"}')
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [1, 2]}
    (source / "config.json").write_text(json.dumps(config))
    convert("import", source, tmp_path / "run", "--tokenizer", tmp_path / "made.json")
    convert("export", tmp_path / "run", tmp_path / "out")
    assert "theirs" in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1, 2]
    assert (tmp_path / "out" / "tokenizer.json").exists()


@functools.cache
def dense_run(base):
    """A run without loops, trained to its end, that no test may change."""
    config = tiny_config(
        finished_run(base).home, base / "dense", model={"loop": {"scheme": "no_loop", "count": 1}}
    )
    result = command("train.py", write_config(base / "dense.yaml", config.model_dump()))
    assert result.code == 0, result
    return config


@pytest.fixture
def dense(tmp_path_factory, tmp_path):
    """The config of that run, of which tmp_path/dense is a copy."""
    config = dense_run(tmp_path_factory.getbasetemp())
    shutil.copytree(config.run_dir, tmp_path / "dense")
    return config


@pytest.mark.slow(reason="trains several runs")
def test_a_retrofit_starts_where_its_source_stands_and_trains_on(finished, dense, tmp_path):
    source, looped, run = tmp_path / "dense", tmp_path / "looped", tmp_path / "run"
    words = ["--loops", "3", "--window", "4", "--hidden_scale", "0", "--gate_bias", "20"]
    out = convert("retrofit", source, looped, *words)
    assert "plt, 3 loops" in out and "within 0 of the source's" in out
    assert_close(evaluate(looped), evaluate(source))

    sections = {"model": {}, "data": dense.data.model_dump(), "start_from": str(looped)}
    training = {"steps": 2, "batch_size": 4, "log_every": 1}
    path = write_config(
        tmp_path / "continue.yaml",
        {**sections, "training": training, "evaluation": {"batch_size": 4}, "run_dir": str(run)},
    )
    result = command(
        "train.py", path, "--training.steps", "1", "--optimizer.warmup_fraction", "0.6"
    )
    assert result.code == 0, result
    assert f"starting from {looped}, step 0" in result.out
    assert "model: plt, 3 loops" in result.out
    # A warmup from 0 leaves the first step's parameters as they were.
    start = read_params(find_checkpoint(looped))
    trained = open_trained(run)
    jax.tree.map(np.testing.assert_array_equal, trained.params, start)
    assert trained.tokenizer.identity == open_trained(source).tokenizer.identity

    looped.rename(tmp_path / "elsewhere")  # which a run that has begun does not need
    resumed = command("train.py", path, "--optimizer.warmup_fraction", "0.6")
    assert resumed.code == 0, resumed
    assert "resuming at step 1 of 2" in resumed.out and "starting from" not in resumed.out
    state = saved_state(open_trained(run).config)
    assert state.step == 2
    moved = jax.tree.map(lambda one, other: bool(np.any(one != other)), state.params, start)
    assert moved["layers"]["q"] and moved["embedding"]


@pytest.mark.slow(reason="trains several runs")
def test_a_retrofit_that_cannot_learn_to_loop_says_so(dense, tmp_path):
    still = ["--hidden_scale", "0", "--window", "4", "--compare_tokens", "0"]
    out = convert("retrofit", tmp_path / "dense", tmp_path / "still", *still)
    assert "note: with hidden_scale 0 no loop reads the one before it" in out
    assert "--model.loop.hidden_scale 0.01" in out and "random tokens" not in out
    out = convert("retrofit", tmp_path / "dense", tmp_path / "clp", "--scheme", "clp")
    assert "note: model.loop.scheme clp has no Hugging Face model type" in out
    assert "hidden_scale" not in out
    words = ["--scheme", "loop_kv_share_window", "--window", "16"]
    out = convert("retrofit", tmp_path / "dense", tmp_path / "iquest", *words)
    assert "Hugging Face" not in out and "the window of 16 held all of them" in out
    convert("export", tmp_path / "iquest", tmp_path / "out")


@pytest.mark.slow(reason="trains a run of its own")
def test_loops_are_not_given_to_a_model_in_passing(dense, tmp_path):
    words = ["--start_from", tmp_path / "dense", "--model.loop.scheme", "clp_kv_share"]
    path = write_config(tmp_path / "looped.yaml", {"run_dir": str(tmp_path / "run")})
    result = command("train.py", path, *words)
    assert_refused(result, "is a model without loops", "plt_jax.convert retrofit")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow(reason="trains several runs")
def test_a_run_that_started_elsewhere_opens_when_that_is_gone(finished, dense, tmp_path):
    config = tiny_config(
        finished.home, tmp_path / "run", start_from=str(tmp_path / "dense"), training={"steps": 1}
    )
    values = config.model_dump(exclude={"model", "tokenizer"})
    result = command("train.py", write_config(tmp_path / "run.yaml", values))
    assert result.code == 0, result
    shutil.rmtree(tmp_path / "dense")
    trained = open_trained(tmp_path / "run")
    assert trained.config.model.loop.scheme == "no_loop"
    assert len(numbers(trained.config)) == 2


@pytest.mark.slow(reason="trains several runs")
def test_the_files_beside_the_weights_come_along(finished, dense, tmp_path):
    """Into the run directory, through continued training, and out again, byte for byte."""
    source = tmp_path / "source"
    convert("export", tmp_path / "dense", source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "special_tokens_map.json").write_text('{"bos_token": "<|bos|>"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    (source / "README.md").write_text("not theirs")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [1, 0]}
    (source / "config.json").write_text(json.dumps(config))

    convert("import", source, tmp_path / "imported")
    values = tiny_config(
        finished.home,
        tmp_path / "run",
        start_from=str(tmp_path / "imported"),
        training={"steps": 1},
    ).model_dump(exclude={"model", "tokenizer"})
    result = command("train.py", write_config(tmp_path / "run.yaml", values))
    assert result.code == 0, result
    convert("export", tmp_path / "run", tmp_path / "out")
    names = ["chat_template.jinja", "special_tokens_map.json", "generation_config.json"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    same, different, missing = filecmp.cmpfiles(source, tmp_path / "out", names, shallow=False)
    assert (sorted(same), different, missing) == (sorted(names), [], [])
    assert not (tmp_path / "out" / "README.md").exists()
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out["eos_token_id"] == [1, 0]
