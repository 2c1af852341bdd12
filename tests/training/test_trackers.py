"""Weights & Biases beside TensorBoard: with a stand-in that records what it is asked, and, where
the package is installed, with itself, offline."""

import sys
import types

import pytest

from plt_jax.errors import FailedError, InputError
from plt_jax.training import trainer
from plt_jax.training.trackers import WeightsAndBiases, check_wandb
from tests.training.runs import STEPS, call_at, tiny_config

PROJECT = {"training": {"wandb_project": "loops"}}


class Run:
    """What `wandb.init` returns."""

    def __init__(self, **settings):
        self.settings, self.rows, self.code = settings, [], None
        self.id = settings["id"] or "abc123"

    def define_metric(self, *names, **settings):
        self.metric = names, settings

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; its `runs` are those that were begun."""
    package = types.ModuleType("wandb")
    package.__spec__ = types.SimpleNamespace()
    package.Error = type("Error", (Exception,), {})
    package.Settings = lambda **settings: settings
    package.runs = []

    def init(**settings):
        package.runs.append(Run(**settings))
        return package.runs[-1]

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_rows_go_there_with_their_step(tmp_path, wandb):
    tracker = WeightsAndBiases(tmp_path, "loops", {"seed": 3})
    tracker.draw(7, {"loss": 2.0})
    tracker.close(failed=False)
    (run,) = wandb.runs
    assert run.rows == [{"step": 7, "loss": 2.0}] and run.code == 0
    assert run.metric == (("*",), {"step_metric": "step"})
    assert run.settings["project"] == "loops" and run.settings["config"] == {"seed": 3}
    assert run.settings["name"] == tmp_path.name and run.settings["id"] is None


@pytest.mark.slow(reason="trains several runs")
def test_all_starts_of_a_run_are_one_there(finished, tmp_path, wandb):
    config = tiny_config(finished.home, tmp_path / "run", **PROJECT)

    def fail():
        raise OSError("gone")

    with call_at(6, fail), pytest.raises(OSError, match="gone"):
        trainer.train(config)
    trainer.train(config)
    first, second = wandb.runs
    assert (first.settings["id"], first.code) == (None, 1)
    assert (second.settings["id"], second.code) == ("abc123", 0)
    assert second.settings["resume"] == "allow"
    assert [row["step"] for row in second.rows if "loss" in row] == list(range(5, STEPS + 1))
    assert {"gate_by_loop/loop_2/layer_1", "bits_per_byte"} <= set().union(*second.rows)


def test_one_that_does_not_begin_ends_the_run_in_a_line(tmp_path, wandb):
    def refuse(**_):
        raise wandb.Error("no account\nlog in")

    wandb.init = refuse
    with pytest.raises(FailedError, match="does not begin: no account log in; set WANDB_MODE"):
        WeightsAndBiases(tmp_path, "loops", {})


def test_a_package_that_is_not_there_is_refused_before_anything_is_written(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"training.wandb_project is loops, .*plt_jax\[wandb\]"):
        trainer.train(tiny_config(finished.home, tmp_path / "run", **PROJECT))
    assert not (tmp_path / "run").exists()
    check_wandb(None)


@pytest.mark.slow(reason="trains a run of its own")
def test_the_package_itself_takes_a_run_offline(finished, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb (pip install 'plt_jax[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_config(finished.home, tmp_path / "run", **PROJECT)
    trainer.train(config)
    folder = tmp_path / "run" / "wandb"
    identity = (folder / "run_id").read_text().strip()
    assert identity and list(folder.rglob(f"*{identity}*.wandb"))
