"""eval.py: what it prints, what it writes, and what it reads."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax.evaluation import scores
from plt_jax.evaluation.scores import evaluate_trained
from plt_jax.runs.names import CHECKPOINTS, METRICS
from tests.training.runs import (
    STEPS,
    assert_refused,
    command,
    json_rows,
    snapshot,
    tiny_values,
    write_config,
)

NAMES = ("loss", "perplexity", "bits_per_byte")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run's directory, to write eval.json in."""
    finished.copy(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_trained_run_scores_as_at_the_end_of_its_training(copy):
    result = command("eval.py", copy)
    assert result.code == 0 and result.err == ""
    written = json.loads((copy / "eval.json").read_text())
    row = [row for row in json_rows(copy / METRICS) if "validation_loss" in row][-1]
    assert row["step"] == written["step"] == STEPS
    assert written["loss"] == pytest.approx(row["validation_loss"], rel=1e-6)
    assert written["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-6)
    assert written["tokens"] == row["validation_tokens"]
    assert written["perplexity"] == pytest.approx(np.exp(written["loss"]), rel=1e-6)
    assert [row["loop"] for row in written["by_loop"]] == [1, 2]
    assert {name: written["by_loop"][-1][name] for name in NAMES} == {
        name: written[name] for name in NAMES
    }
    assert written["by_loop"][0]["loss"] != written["loss"]
    bits = written["loss"] * written["tokens"] / np.log(2) / written["bytes"]
    assert written["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_the_numbers_are_printed_as_json_and_as_a_table(copy):
    out = command("eval.py", copy).out
    numbers, end = json.JSONDecoder().raw_decode(out)
    assert numbers == json.loads((copy / "eval.json").read_text())
    head, one, two, last = out[end:].strip().splitlines()
    assert head.split() == ["loop", "loss", "perplexity", "bits", "per", "byte"]
    for line, row in zip((one, two), numbers["by_loop"], strict=True):
        expected = [row["loop"], row["loss"], row["perplexity"], row["bits_per_byte"]]
        assert [float(word) for word in line.split()] == pytest.approx(expected, abs=6e-3)
    assert last == f"written to {copy / 'eval.json'}"


@pytest.mark.slow(reason="compiles several programs")
def test_the_batch_size_changes_nothing(copy):
    whole = evaluate_trained(str(copy)).numbers
    other = evaluate_trained(str(copy), batch_size=3).numbers
    for name in NAMES:
        assert other[name] == pytest.approx(whole[name], rel=1e-5)


def test_one_checkpoint_may_be_named(copy):
    numbers = evaluate_trained(str(copy / CHECKPOINTS / "4")).numbers
    assert numbers["step"] == 4
    assert numbers["loss"] != evaluate_trained(str(copy)).numbers["loss"]
    assert json.loads((copy / "eval.json").read_text())["step"] == STEPS


def test_other_text_is_read_in_full(copy, tmp_path):
    text = "peace in every land, and in œuvres: " * 5
    (tmp_path / "other.txt").write_text(text, encoding="utf-8")
    numbers = evaluate_trained(str(copy), str(tmp_path / "other.txt")).numbers
    assert numbers["bytes"] == len(text.encode())
    assert numbers["text"] == str(tmp_path / "other.txt")
    bits = numbers["loss"] * numbers["tokens"] / np.log(2) / len(text.encode())
    assert numbers["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    # The same text as a folder of two documents has one more that is not predicted.
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tmp_path / "other.txt", folder / "a.txt")
    shutil.copy(tmp_path / "other.txt", folder / "b.txt")
    double = evaluate_trained(str(copy), str(folder)).numbers
    assert double["bytes"] == 2 * numbers["bytes"]
    assert double["tokens"] == 2 * numbers["tokens"]


def test_the_held_out_text_as_a_file_scores_the_same(copy, finished, tmp_path):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for number in (2, 6, 10):
        shutil.copy(finished.home / "corpus" / f"{number:02}.txt", held_out)
    one, other = evaluate_trained(str(copy)), evaluate_trained(str(copy), str(held_out))
    for name in (*NAMES, "tokens", "bytes"):
        assert one.numbers[name] == other.numbers[name]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--text", "nowhere.txt"], ["there is no text at 'nowhere.txt'"]),
        (["--batch_size", "0"], ["--batch_size is 0; it must be at least 1"]),
        (["--batch_size", "many"], ["--batch_size", "invalid int value: 'many'"]),
        (["--txt", "x"], ["unknown option --txt; did you mean --text?"]),
    ],
)
def test_bad_options_are_refused(copy, words, parts):
    before = snapshot(copy)
    assert_refused(command("eval.py", copy, *words), *parts)
    assert snapshot(copy) == before


def test_bad_paths_are_refused(copy, tmp_path):
    assert_refused(command("eval.py"), "required: path")
    assert_refused(command("eval.py", tmp_path / "none"), "does not exist")
    assert_refused(command("eval.py", tmp_path), "neither a run directory nor a checkpoint of one")
    shutil.rmtree(copy / CHECKPOINTS)
    assert_refused(command("eval.py", copy), "holds no checkpoint; train until the first is saved")


def test_a_run_whose_text_is_gone_is_refused(copy, finished, tmp_path):
    values = tiny_values(tmp_path / "moved", run_dir=str(copy))
    write_config(copy / "config.yaml", values)
    before = snapshot(copy)
    assert_refused(command("eval.py", copy), f"there is no text at '{tmp_path}/moved/corpus'")
    assert snapshot(copy) == before


def test_a_run_that_cannot_be_written_to_is_refused(copy):
    (copy / "eval.json").mkdir()
    assert_refused(command("eval.py", copy), "eval.json")


def test_help(capsys):
    result = command("eval.py", "--help")
    assert result.code == 0
    for word in ("path", "--text", "--batch_size", "bits per byte"):
        assert word in result.out


@pytest.mark.slow(reason="compiles several programs")
def test_other_numbers_of_loops_stand_in_the_table(copy):
    result = command("eval.py", copy, "--at_loops", "1,2,3")
    assert result.code == 0 and result.err == ""
    written = json.loads((copy / "eval.json").read_text())
    one, two, three = written["at_loops"]
    assert [row["loops"] for row in (one, two, three)] == [1, 2, 3]
    # Its own number; and one loop is what the head reads out on loop 1.
    assert two["loss"] == pytest.approx(written["loss"], rel=1e-6)
    assert one["loss"] == pytest.approx(written["by_loop"][0]["loss"], rel=1e-6)
    assert three["loss"] != two["loss"] and np.isfinite(three["loss"])
    assert "with other numbers of loops:" in result.out


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        ("1,two", "argument --at_loops: 1,two is not a list of numbers, as 1,2,3"),
        ("0", "plt cannot run 0 loops; give 1 or more"),
    ],
)
def test_numbers_of_loops_that_are_none_are_refused(copy, loops, message):
    assert_refused(command("eval.py", copy, "--at_loops", loops), message)


def test_scores_that_are_not_numbers_are_null(copy, monkeypatch):
    """JSON has no NaN: other readers would refuse the whole file."""
    opened = scores.open_trained

    def damaged(*arguments, **options):
        trained = opened(*arguments, **options)
        return trained._replace(params=jax.tree.map(lambda x: x * jnp.nan, trained.params))

    monkeypatch.setattr(scores, "open_trained", damaged)
    evaluate_trained(str(copy))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((copy / "eval.json").read_text(), parse_constant=refuse)
    assert [written[name] for name in NAMES] == [None, None, None]
