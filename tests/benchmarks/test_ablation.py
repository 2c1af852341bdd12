"""The ablation: what it trains, that it goes on, and what its report makes of given scores."""

import json
import statistics

import pytest

from plt_jax.benchmarks import ablation, ablation_report
from plt_jax.benchmarks.ablation import ROWS, config_of, main, parse
from plt_jax.benchmarks.decode import Case, with_scheme
from plt_jax.errors import InputError
from plt_jax.model.costs import flops_by_loop
from plt_jax.training.loop import Outcome
from tests.training.runs import make_home, tiny_values, write_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("ablation"))


def write(home, name, **sections):
    values = tiny_values(home, run_dir=str(home / name), **sections)
    return str(write_config(home / f"{name}.yaml", values))


def test_the_rows_are_the_papers_and_the_bound():
    labels = ["no_loop", "vanilla_loop-2", "clp-2", "clp_kv_share-2", "plt-2", "plt-3"]
    assert [case.label for case in ROWS] == [*labels, "no_loop-2x_layers"]
    for label, other, _ in ablation_report.COMPARISONS:
        assert {label, other} <= {case.label for case in ROWS}


def test_rows_differ_in_the_scheme_alone(home):
    _, config = parse([write(home, "runs", seed=4)])
    for case in ROWS:
        run = config_of(config, case, 7)
        assert run.run_dir.endswith(f"runs/{case.label}/seed_7")
        assert (run.model.loop.scheme, run.model.loop.count) == (case.scheme, case.loops)
        assert run.model.layers == case.depth * config.model.layers
        back = {"model": config.model, "seed": config.seed, "run_dir": config.run_dir}
        assert run.model_copy(update=back) == config
        loop = config.model.loop.model_copy(update={"scheme": "plt", "count": 2})
        same = run.model.model_copy(update={"layers": config.model.layers, "loop": loop})
        assert same == config.model.model_copy(update={"loop": loop})
    deep, looped = (
        flops_by_loop(with_scheme(config.model, case), 16)
        for case in (ROWS[-1], Case("vanilla_loop", 2))
    )
    assert sum(one.layers for one in deep) == sum(one.layers for one in looped)


def test_it_trains_once_and_goes_on(home, capsys, monkeypatch):
    path = write(home, "text", training={"steps": 4, "evaluate_every": 2})
    words = [path, "--seeds", "1", "--decode_rounds", "0"]
    assert main([*words, "--rows", "no_loop"]) is None
    assert "plt-2" not in (home / "text" / "ablation.txt").read_text()
    trained = []
    train = ablation.train
    monkeypatch.setattr(ablation, "train", lambda config: trained.append(config) or train(config))
    main([path, "--seeds", "2", "--rows", "no_loop,plt-2", "--decode_rounds", "1"])
    names = [config.run_dir.split("/text/")[1] for config in trained]
    assert names == ["plt-2/seed_0", "no_loop/seed_1", "plt-2/seed_1"]
    report = json.loads((home / "text" / "ablation.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["no_loop", "plt-2"]
    assert report["tokens"] == 4 * 4 * 16
    for row in report["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert [[step for step, _ in run["curve"]] for run in row["runs"]] == [[2, 4]] * 2
        assert all(run["loss"] == run["curve"][-1][1] for run in row["runs"])
    timed = {row["label"]: row for row in report["decode"]["rows"]}
    assert set(timed) == {case.label for case in ROWS}
    assert timed["no_loop-2x_layers"]["kv_bytes"] == 2 * timed["no_loop"]["kv_bytes"]
    read = {label: row["weight_bytes_read"] for label, row in timed.items()}
    assert read["no_loop-2x_layers"] == read["vanilla_loop-2"]
    assert read["no_loop"] == read["clp-2"] < read["vanilla_loop-2"]
    text = (home / "text" / "ablation.txt").read_text()
    command, table = text.split("\n", 1)
    assert command == f"$ {report['command']}"
    assert capsys.readouterr().out.endswith(table)
    assert {"scores.png", "curves.png"} <= {path.name for path in (home / "text").iterdir()}


def test_a_stopped_row_ends_it(home, monkeypatch):
    monkeypatch.setattr(ablation, "train", lambda config: Outcome(1, stopped=True))
    assert main([write(home, "stopped"), "--seeds", "1"]) == 3


def test_questions_are_scored_by_their_answers(home):
    questions = {"task": "addition", "difficulties": [1, 2], "test_difficulties": [1, 2, 3]}
    sections = {"data": {"questions": questions}, "training": {"steps": 2}}
    main(
        [
            write(home, "sums", **sections),
            *["--seeds", "1", "--rows", "no_loop", "--decode_rounds", "0"],
        ]
    )
    (row,) = json.loads((home / "sums" / "ablation.json").read_text())["rows"]
    assert [one["difficulty"] for one in row["runs"][0]["by_difficulty"]] == [1, 2, 3]
    text = (home / "sums" / "ablation.txt").read_text()
    assert "difficulty     1     2    3*" in text
    assert (home / "sums" / "difficulties.png").exists()


def report_of(scores, task="none"):
    """As ablation.json, of given scores by row and seed."""
    return {
        "task": task,
        "tokens": 1000,
        "machine": {"device": "d", "processor": "p", "cores": 2, "python": "3", "jax": "0"},
        "decode": None,
        "rows": [
            {
                "label": label,
                "parameters": 10**6,
                "flops": flops,
                "runs": [
                    {"seed": seed, "bits_per_byte": score, "curve": [[1, 2.0]]}
                    for seed, score in by_seed.items()
                ],
            }
            for flops, (label, by_seed) in enumerate(scores.items(), start=1)
        ],
    }


def test_differences_are_of_the_same_seeds():
    scores = {
        "no_loop": {0: 1.6, 1: 1.5, 2: 1.7},
        "vanilla_loop-2": {0: 1.5, 1: 1.45, 3: 9.0},
    }
    report = report_of(scores)
    found = ablation_report.differences(report, "vanilla_loop-2", "no_loop")
    assert found == pytest.approx([-0.1, -0.05])
    text = ablation_report.text_of(report)
    line = next(line for line in text.splitlines() if line.startswith("vanilla_loop-2 - no_loop"))
    deviation = statistics.stdev(found)
    assert line.split()[-4:] == ["-0.0750", f"{deviation:.4f}", "-0.1000", "-0.0500"]
    line = next(line for line in text.splitlines() if line.startswith("no_loop "))
    assert line.split() == ["no_loop", "1.00", "1.00", "3", "1.6000", "0.1000"]
    assert "vanilla_loop-2  " in text and "plt-2 - " not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "no_loop,plt-9"], "--rows has no row plt-9; there are no_loop, vanilla_loop-2"),
        (["--seeds", "0"], "--seeds is 0; it must be 1 or more"),
        (["--decode_rounds", "-1"], "--decode_rounds is -1; it must be 0 or more"),
    ],
)
def test_what_cannot_be_done_is_refused(home, words, message):
    with pytest.raises(InputError, match=message):
        main([write(home, "refused"), *words])
