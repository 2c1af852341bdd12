"""The recipe study: which runs it asks for, that it goes on, and what its table says."""

import fcntl
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import recipe
from benchmarks.recipe import Job, Study, main, open_jobs, read_results, table, wanted
from plt_jax.config.yaml_file import load_resolved
from plt_jax.errors import InputError
from plt_jax.runs.directory import open_trained
from plt_jax.training.trainer import Outcome
from tests.training.runs import REPOSITORY, make_home, tiny_values, write_config

NO_LOOP = {"model": {"loop": {"scheme": "no_loop", "count": 1}}}


def results_of(losses, row="a", seed=0):
    """Finished runs, of losses by the learning rate in doublings."""
    return {Job(row, rate, seed): {"loss": loss} for rate, loss in losses.items()}


@pytest.mark.parametrize(
    ("losses", "rates"),
    [
        ({}, [0]),
        ({0: 1.0}, [1, -1]),
        ({0: 1.0, 1: 2.0}, [-1]),
        ({0: 1.0, 1: 0.5, -1: 2.0}, [2]),
        ({0: 1.0, 1: 0.5, 2: 0.6, -1: 2.0}, []),
        ({0: 1.0, 1: 2.0, -1: 0.5}, [-2]),
        ({0: 1.0, 1: None, -1: 2.0}, []),  # a loss that is not finite
        ({0: math.inf}, [1, -1]),
    ],
)
def test_rates_are_tried_until_both_neighbours_of_the_best_are_worse(losses, rates):
    assert wanted("a", results_of(losses), seeds=1) == [Job("a", rate, 0) for rate in rates]


def test_the_best_rate_is_run_with_the_other_seeds():
    results = results_of({0: 1.0, 1: 0.5, 2: 0.6, -1: 2.0})
    assert wanted("a", results, seeds=3) == [Job("a", 1, 1), Job("a", 1, 2)]
    results |= results_of({1: 0.4}, seed=1)
    assert wanted("a", results, seeds=3) == [Job("a", 1, 2)]
    assert wanted("a", results, seeds=2) == []
    # Another row's runs are its own, and all rows' rates come first.
    assert open_jobs(["a", "b"], results, seeds=3) == [Job("b", 0, 0), Job("a", 1, 2)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("recipe"))


def write_study(home, name="study", **changes):
    task = {"task": "addition", "difficulties": [1, 2], "test_difficulties": [1, 2]}
    values = tiny_values(home, data={"synthetic": task}, training={"steps": 2})
    study = {
        "config": str(write_config(home / "config.yaml", values)),
        "learning_rate": 1e-2,
        "baselines": ["plt-2"],
        "rows": {"no_loop": NO_LOOP, "plt-2": None},
    } | changes
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": []}, "unknown key learning_rates"),
        ({"baselines": ["plt-3"]}, "baselines names plt-3, which is no row"),
        ({"rows": {"plt-2": {"model": {"loop": {"windows": 3}}}}}, "windows"),
        ({"rows": {"plt-2": {"model": {"width": 7}}}}, "width"),
        ({"rows": None}, "of the wrong type"),
        ({"learning_rate": "fast"}, "of the wrong type"),
        ({"rows": {"plt-2": {"steps_without_loops": "few"}}}, "few; give a number"),
        ({"rows": {"plt-2": {"steps_without_loops": True}}}, "True; give a number"),
        ({"rows": {"plt-2": {"steps_without_loops": 2}}}, "fewer steps than training has"),
        ({"rows": {"plt-2": {"steps_without_loops": -1}}}, "fewer steps than training has"),
        ({"rows": {"plt-2": NO_LOOP | {"steps_without_loops": 1}}}, "give it to a looped row"),
        ({"rows": {"plt-2": None, "a b": None, "a,b": None}}, "a b and a,b have one folder"),
    ],
)
def test_a_broken_study_is_refused(home, changes, message):
    with pytest.raises(InputError, match=message):
        Study(write_study(home, "broken", **changes))
    path = home / "incomplete.yaml"
    path.write_text("config: x.yaml", encoding="utf-8")
    with pytest.raises(InputError, match="has no learning_rate"):
        Study(path)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks" / "recipes").glob("*.yaml")))
def test_every_study_of_the_repository_is_sound(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = Study(path)
    folders = {study.config(Job(row, 0, 0), Path("runs")).run_dir for row in study.rows}
    assert len(folders) == len(study.rows)


def test_a_run_differs_from_the_configuration_in_row_rate_and_seed(home):
    study = Study(write_study(home))
    config = study.config(Job("no_loop", 2, 5), home / "runs")
    assert (config.seed, config.optimizer.learning_rate) == (5, 4e-2)
    assert config.model.loop.scheme == "no_loop"
    assert config.run_dir == str(home / "runs" / "study" / "no_loop" / "rate_0.04" / "seed_5")


def line(row, doublings, seed, loss, accuracy):
    answers = {"by_difficulty": [{"accuracy": accuracy, "questions": 10}]}
    return {"row": row, "doublings": doublings, "seed": seed, "loss": loss, **answers}


def test_the_table_compares_rows_at_their_best_rates_seed_by_seed(home):
    lines = [
        *(
            line("plt-2", 0, 0, 0.5, 0.2),
            line("plt-2", 1, 0, 0.1, 0.9),
            line("plt-2", 1, 1, 1, 0.7),
        ),
        *(line("no_loop", 0, 0, 0.6, 0.1), line("no_loop", 1, 0, 0.7, 0.3)),
    ]
    results = {Job(one["row"], one["doublings"], one["seed"]): one for one in lines}
    rows = table(Study(write_study(home)), results).splitlines()
    assert rows[1].split()[2:] == ["2", "0.01", "0.6000", "1", "10.0%", "-80.0%"]
    label, flops, *rest = rows[2].split()
    assert label == "plt-2" and 1.2 < float(flops) < 2.5
    assert rest == ["2", "0.02", "0.1000", "2", "80.0%", "14.1%"]


def call(monkeypatch, home, *words):
    path, out = str(write_study(home)), str(home / "out")
    runs = ["--out", out, "--runs", str(home / "runs"), "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["recipe", path, *runs, *words])
    return main()


@pytest.mark.slow(reason="trains several runs")
def test_it_trains_each_run_once_and_goes_on(home, capsys, monkeypatch):
    trained, train = [], recipe.train
    monkeypatch.setattr(recipe, "train", lambda config: trained.append(config) or train(config))
    assert call(monkeypatch, home, "--only", "plt-2") is None
    lines = home / "out" / "study.jsonl"
    results = read_results(lines)
    assert len(trained) == len(results) >= 4
    assert {job.row for job in results} == {"plt-2"} and {job.seed for job in results} == {0, 1}
    assert all(one["by_difficulty"] and one["seconds"] >= 0 for one in results.values())
    assert call(monkeypatch, home, "--only", "plt-2") is None
    assert len(trained) == len(results)
    assert capsys.readouterr().out.endswith(
        (home / "out" / "study.txt").read_text().split("\n\n")[0] + "\n"
    )
    assert len(list((home / "runs").rglob("checkpoints"))) == len(results)  # to be looked at


@pytest.mark.slow(reason="trains two runs")
def test_a_row_may_begin_without_loops(home):
    row = {"model": {"loop": {"gate_bias": 3.0}}, "steps_without_loops": 1}
    study = Study(write_study(home, "begin", rows={"plt-2": None, "begun": row}))
    job, runs = Job("begun", 1, 4), home / "runs"
    line = recipe.run(study, job, runs)
    assert line["row"] == "begun" and math.isfinite(line["loss"])
    folder = runs / "begin" / "begun" / "rate_0.02"
    first, start, last = (
        load_resolved(folder / name / "config.yaml")
        for name in ("seed_4_without_loops", "seed_4_start", "seed_4")
    )
    assert (first.model.loop.scheme, first.training.steps) == ("no_loop", 1)
    assert first.optimizer.schedule == "constant" and first.seed != last.seed == 4
    assert last.start_from == str(folder / "seed_4_start") and last.training.steps == 1
    assert start.model == last.model and start.model.loop.gate_bias == 3.0
    trained, begun = (open_trained(folder / name).params for name in ("seed_4", "seed_4_start"))
    assert not np.array_equal(trained["embedding"], begun["embedding"])
    np.testing.assert_array_equal(
        begun["embedding"], open_trained(folder / "seed_4_without_loops").params["embedding"]
    )
    # A call that was stopped goes on where it was.
    assert recipe.run(study, job, runs)["loss"] == line["loss"]
    plain, mixed = (float(row.split()[1]) for row in table(study, rows_of(study)).splitlines()[1:])
    assert plain == 1.0 > mixed > 0.6


def rows_of(study):
    """A result of each row of a study."""
    lines = [line(row, 0, 0, 1.0, 0.5) for row in study.rows]
    return {Job(one["row"], 0, 0): one for one in lines}


def test_a_run_that_another_call_trains_is_left_to_it(home, monkeypatch):
    study, runs = Study(write_study(home)), home / "beside"
    begun = []
    outcome = Outcome(1, stopped=True)
    monkeypatch.setattr(recipe, "train", lambda config: begun.append(config.run_dir) or outcome)
    jobs = [Job("no_loop", 0, 0), Job("plt-2", 0, 0)]
    folder = study.config(jobs[0], runs).directory
    folder.parent.mkdir(parents=True)
    with (folder.parent / "seed_0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert recipe.run_first_free(study, jobs[:1], runs, home / "none.jsonl") is False
        assert recipe.run_first_free(study, jobs, runs, home / "none.jsonl") is None
    assert begun == [study.config(jobs[1], runs).run_dir]
    done = home / "done.jsonl"
    done.write_text(json.dumps({"row": "no_loop", "doublings": 0, "seed": 0}) + "\n")
    assert recipe.run_first_free(study, jobs[:1], runs, done) is False


def test_unknown_rows_are_refused(home, monkeypatch):
    with pytest.raises(InputError, match="no row plt-9; there are no_loop, plt-2"):
        call(monkeypatch, home, "--only", "plt-2;plt-9")
