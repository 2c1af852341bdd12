"""Runs with bad data: they skip steps, roll back, or stop, and lose nothing."""

import contextlib
import os
import signal
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from plt_jax.checkpoint.steps import list_steps
from plt_jax.data import pipeline
from plt_jax.errors import FailedError
from plt_jax.runs.directory import open_trained
from plt_jax.runs.names import CHECKPOINTS
from plt_jax.training import trainer
from plt_jax.training.guard import LAG
from tests.training.runs import (
    STEPS,
    assert_same_run,
    call_at,
    numbers,
    tiny_config,
)

pytestmark = pytest.mark.slow(reason="trains several runs")

BATCH = 4
PATIENT = {"patience": 2}
NOTICED = 2 + LAG
"""Steps from the first bad one to the rollback: the patience and the guard's lag."""


@contextlib.contextmanager
def bad_data(*batches: int, value: float = np.nan):
    """Spoils batches of the data, counted from 0, wherever a run is when it reads them."""
    read = pipeline._Rows.__getitem__

    def spoil(rows, index):
        example = read(rows, index)
        if index // len(rows._rows) in batches:
            example = example | {"weights": np.full_like(example["weights"], value)}
        return example

    with mock.patch.object(pipeline._Rows, "__getitem__", spoil):
        yield


def steps_of(config) -> list[int]:
    return list_steps(Path(config.run_dir) / CHECKPOINTS)


def finite_params(config) -> bool:
    params = open_trained(config.run_dir).params
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_batch_is_skipped_and_counted(finished, tmp_path, capsys, value):
    config = tiny_config(finished.home, tmp_path / "run")
    with bad_data(2, value=value):
        assert trainer.train(config) == trainer.Outcome(STEPS, stopped=False)
    rows = [row for row in numbers(config) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert rows[2]["loss"] is None
    undisturbed = numbers(finished.config)
    assert numbers(config)[:2] == undisturbed[:2]
    assert numbers(config)[3]["loss"] != undisturbed[3]["loss"]  # one update less came before
    assert finite_params(config)
    assert "step 3: 1 of the steps since the last line were skipped" in capsys.readouterr().out


def test_steps_between_lines_are_counted_too(finished, tmp_path):
    config = tiny_config(finished.home, tmp_path / "run", training={"log_every": 4})
    with bad_data(1, 5, 6):
        trainer.train(config)
    assert [row["skipped"] for row in numbers(config) if "loss" in row] == [1, 2]


def test_a_stretch_of_bad_data_is_gone_back_from_and_passed_over(finished, tmp_path, capsys):
    config = tiny_config(finished.home, tmp_path / "run", guard=PATIENT)
    with bad_data(5, 6, 7, 8):
        assert trainer.train(config) == trainer.Outcome(STEPS, stopped=False)
    out = capsys.readouterr().out
    step = 5 + NOTICED
    # The run would have ended at step 8, before it could go back, had it not been longer.
    assert "rolling back" not in out
    config = tiny_config(finished.home, tmp_path / "longer", guard=PATIENT, training={"steps": 12})
    with bad_data(5, 6, 7, 8):
        assert trainer.train(config) == trainer.Outcome(12, stopped=False)
    out = capsys.readouterr().out
    assert (
        f"rolling back from step {step} to 4, and going on with the data after it: the loss is nan"
        in out
    )
    rows = numbers(config)
    assert {"step": 4, "rolled_back_from": step} in rows
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert not any(row["skipped"] for row in rows if "loss" in row)
    assert finite_params(config)


def test_what_follows_is_the_same_however_often_it_is_killed(finished, tmp_path):
    sections = {"guard": PATIENT, "training": {"steps": 14}}
    whole = tiny_config(finished.home, tmp_path / "whole", **sections)
    broken = tiny_config(finished.home, tmp_path / "broken", **sections)

    def fail():
        raise RuntimeError("power cut")

    with bad_data(5, 6, 7, 8, 11):
        trainer.train(whole)
        for at in (6, 7, 9):
            with call_at(at, fail), pytest.raises(RuntimeError, match="power cut"):
                trainer.train(broken)
        trainer.train(broken)
    assert_same_run(broken, whole)


def test_data_that_stays_bad_stops_the_run_with_its_checkpoints_intact(finished, tmp_path):
    sections = {"guard": PATIENT | {"rollbacks": 1}, "training": {"steps": 30}}
    config = tiny_config(finished.home, tmp_path / "run", **sections)
    message = (
        r"the loss is nan at step 6, the last of 2 in a row that were skipped \(guard.patience\), "
        r"and it was rolled back 1 times \(guard.rollbacks\); look at the data, raise guard.roll"
    )
    with bad_data(*range(5, 40)), pytest.raises(FailedError, match=message):
        trainer.train(config)
    assert steps_of(config) == [4]
    assert finite_params(config)
    # With the data mended, as if nothing had been.
    trainer.train(config)
    other = tiny_config(finished.home, tmp_path / "other", **sections)
    trainer.train(other)
    assert [row for row in numbers(config) if "rolled_back_from" not in row] == numbers(other)


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(finished, tmp_path):
    config = tiny_config(finished.home, tmp_path / "run", guard=PATIENT)
    message = "there is no checkpoint to roll back to"
    with bad_data(*range(40)), pytest.raises(FailedError, match=message):
        trainer.train(config)
    assert steps_of(config) == []


def test_no_checkpoint_is_made_of_a_step_out_of_order(finished, tmp_path):
    config = tiny_config(
        finished.home,
        tmp_path / "run",
        training={"checkpoint_every": 2, "log_every": 8},
        checkpoint={"keep": 10},
    )
    with bad_data(3):
        trainer.train(config)
    assert steps_of(config) == [2, 5, 6, 8]


@pytest.mark.parametrize("stretch", [(5, 6), (4, 5, 6, 7, 8), (6, 7), (8, 9, 10)])
def test_a_stretch_anywhere_beside_a_checkpoint_is_gone_back_from_once(
    finished, tmp_path, capsys, stretch
):
    config = tiny_config(
        finished.home,
        tmp_path / "run",
        guard=PATIENT | {"rollbacks": 2},
        training={"steps": 16},
    )
    with bad_data(*stretch):
        assert trainer.train(config) == trainer.Outcome(16, stopped=False)
    assert 1 <= capsys.readouterr().out.count("rolling back from") <= 2


@pytest.mark.parametrize("at", [6, 7, 8])
def test_a_run_stopped_in_a_bad_stretch_goes_on(finished, tmp_path, at):
    config = tiny_config(finished.home, tmp_path / "run", guard=PATIENT, training={"steps": 14})
    with bad_data(5, 6, 7):
        with call_at(at, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            assert trainer.train(config).stopped
        assert trainer.train(config) == trainer.Outcome(14, stopped=False)
    assert finite_params(config)


@contextlib.contextmanager
def a_spike_at(batch: int):
    """The same weights on targets that no text has."""
    read = pipeline._Rows.__getitem__

    def spoil(rows, index):
        example = read(rows, index)
        if index // len(rows._rows) == batch:
            example = example | {"targets": np.full_like(example["targets"], 269)}
        return example

    with mock.patch.object(pipeline._Rows, "__getitem__", spoil):
        yield


def test_a_spike_is_skipped_also_where_the_run_was_killed_before(finished, tmp_path):
    sections = {
        "guard": {"spike_deviations": 8.0, "window": 8, "patience": 4},
        "training": {"steps": 30, "evaluate_every": 30, "checkpoint_every": 5},
    }
    whole = tiny_config(finished.home, tmp_path / "whole", **sections)
    broken = tiny_config(finished.home, tmp_path / "broken", **sections)

    def fail():
        raise RuntimeError("power cut")

    with a_spike_at(25):
        trainer.train(whole)
        with call_at(23, fail), pytest.raises(RuntimeError, match="power cut"):
            trainer.train(broken)
        assert steps_of(broken)[-1] == 20  # fewer steps before the spike than the window has
        trainer.train(broken)
    skipped = [row for row in numbers(whole) if row.get("skipped")]
    assert [row["step"] for row in skipped] == [26]
    assert skipped[0]["loss"] is not None
    assert_same_run(broken, whole)
