"""The comparison with another commit: turns, ratios, the verdict, and what it refuses."""

import json
import sys

import pytest

from benchmarks import against_commit
from benchmarks.against_commit import COMMIT, WORKING_TREE, Workload, compare, read_times
from plt_jax.errors import FailedError, InputError
from tests.training.runs import REPOSITORY

DECODE = Workload("decode, float32", "ms/token", ("module",))


def test_ratios_pair_rounds_and_noise_is_the_spread_of_all_times():
    found = {
        COMMIT: {"plt-2": [[10.0, 10.2, 10.4], [20.0, 20.0, 20.0]], "old": [[1.0]]},
        WORKING_TREE: {"plt-2": [[10.2, 10.2, 10.2], [22.0, 22.0, 22.0]]},
    }
    (row,) = compare(DECODE, found)
    assert (row["ratio"], row["ratio_min"]) == (pytest.approx(1.05), pytest.approx(1.0))
    assert (row[COMMIT]["ms_min"], row[COMMIT]["ms_max"]) == (10.0, 20.0)
    assert row["within_noise"]
    slower = {COMMIT: {"plt-2": [[1.0, 1.1]]}, WORKING_TREE: {"plt-2": [[1.2, 1.3]]}}
    assert not compare(DECODE, slower)[0]["within_noise"]


def test_sides_begin_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr(Workload, "measure", lambda self, checkout, cache: {"plt-2": [checkout]})
    order = []
    monkeypatch.setattr("builtins.print", lambda line, flush: order.append(line.split(": ")[1]))
    found = against_commit.take_turns(DECODE, {"a": "A", "b": "B"}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": {"plt-2": [["A"]] * 3}, "b": {"plt-2": [["B"]] * 3}}


def test_both_benchmarks_figures_are_read(tmp_path):
    (tmp_path / "decode").mkdir()
    cells = [{"rows": [{"label": "plt-2", "rounds_ms": [1.5, 2.5]}]}]
    (tmp_path / "decode" / "decode.json").write_text(json.dumps({"cells": cells}))
    assert read_times(tmp_path / "decode") == {"plt-2": [1.5, 2.5]}
    rows = [{"label": "no_loop", "seconds": [0.25]}]
    (tmp_path / "train").write_text(json.dumps({"rows": rows}))
    assert read_times(tmp_path / "train") == {"no_loop": [250.0]}


def test_a_benchmark_that_fails_is_named(tmp_path):
    workload = Workload("decode", "ms/token", ("plt_jax.benchmarks.decode", "none.yaml"))
    with pytest.raises(FailedError, match=r"decode in .* ended with 2: error: .*none.yaml"):
        workload.measure(REPOSITORY, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["0000000"], "git rev-parse: fatal: "), (["HEAD", "--rounds", "0"], "--rounds is 0")],
)
def test_bad_input_is_refused(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["against_commit", *words])
    with pytest.raises(InputError, match=message):
        against_commit.main()


def test_the_table_has_every_variant(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Workload, "measure", lambda *_: {"no_loop": [2.0], "plt-2": [20.0, 21.0]})
    monkeypatch.setattr(against_commit, "git", lambda *words: "" if "status" in words else "abc")
    monkeypatch.setattr(sys, "argv", ["against_commit", "abc", "--out", str(tmp_path)])
    against_commit.main()
    text = (tmp_path / "against_commit.md").read_text()
    assert text in capsys.readouterr().out
    line = "| decode, bfloat16 | plt-2 | 20.5 (20.0-21.0) ms/token | 20.5 (20.0-21.0) ms/token |"
    assert f"{line} 1.000 (1.000-1.000) | yes |" in text
    report = json.loads((tmp_path / "against_commit.json").read_text())
    assert len(report["rows"]) == 6
    assert report["uncommitted_changes"] is False
