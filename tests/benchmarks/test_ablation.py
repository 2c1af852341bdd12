"""The ablation: what it trains, that it goes on, and what its report makes of given scores."""

import json
import statistics

import pytest

from plt_jax.benchmarks import ablation, ablation_report
from plt_jax.benchmarks.ablation import ROWS, main, parse, run_config
from plt_jax.benchmarks.decode import DecodeSettings
from plt_jax.config.variants import Variant
from plt_jax.errors import InputError
from plt_jax.model.costs import flops_by_loop
from plt_jax.training.trainer import Outcome
from tests.training.runs import make_home, tiny_values, write_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("ablation"))


def write(home, name, **sections):
    values = tiny_values(home, run_dir=str(home / name), **sections)
    return str(write_config(home / f"{name}.yaml", values))


def test_the_rows_are_the_papers_and_the_bound():
    labels = ["no_loop", "vanilla_loop-2", "clp-2", "clp_kv_share-2", "plt-2", "plt-3"]
    assert [variant.label for variant in ROWS] == [*labels, "no_loop-2x_layers"]
    for label, other, _ in ablation_report.COMPARISONS:
        assert {label, other} <= {variant.label for variant in ROWS}


def test_rows_differ_in_the_scheme_alone(home):
    _, config = parse([write(home, "runs", seed=4)])
    for variant in ROWS:
        run = run_config(config, variant, 7)
        assert run.run_dir.endswith(f"runs/{variant.label}/seed_7")
        assert (run.model.loop.scheme, run.model.loop.count) == (variant.scheme, variant.loops)
        assert run.model.layers == variant.depth * config.model.layers
        back = {"model": config.model, "seed": config.seed, "run_dir": config.run_dir}
        assert run.model_copy(update=back) == config
        loop = config.model.loop.model_copy(update={"scheme": "plt", "count": 2})
        same = run.model.model_copy(update={"layers": config.model.layers, "loop": loop})
        assert same == config.model.model_copy(update={"loop": loop})
    deep, looped = (
        flops_by_loop(variant.apply(config.model), 16)
        for variant in (ROWS[-1], Variant("vanilla_loop", 2))
    )
    assert sum(one.layers for one in deep) == sum(one.layers for one in looped)


@pytest.mark.slow(reason="trains several runs")
def test_it_trains_once_and_goes_on(home, capsys, monkeypatch):
    path = write(home, "text", training={"steps": 4, "evaluate_every": 2})
    assert main([path, "--seeds", "1", "--rows", "no_loop"]) is None
    assert "plt-2" not in (home / "text" / "ablation.txt").read_text()
    trained = []
    train = ablation.train
    monkeypatch.setattr(ablation, "train", lambda config: trained.append(config) or train(config))
    main([path, "--seeds", "2", "--rows", "no_loop,plt-2"])
    names = [config.run_dir.split("/text/")[1] for config in trained]
    assert names == ["plt-2/seed_0", "no_loop/seed_1", "plt-2/seed_1"]
    report = json.loads((home / "text" / "ablation.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["no_loop", "plt-2"]
    assert report["tokens"] == 4 * 4 * 16
    for row in report["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert [[step for step, _ in run["curve"]] for run in row["runs"]] == [[2, 4]] * 2
        assert all(run["loss"] == run["curve"][-1][1] for run in row["runs"])
    assert report["decode"] is None
    command, table = (home / "text" / "ablation.txt").read_text().split("\n", 1)
    assert command == f"$ {report['command']}"
    assert capsys.readouterr().out.endswith(table)
    assert {"scores.png", "curves.png"} <= {path.name for path in (home / "text").iterdir()}
    monkeypatch.setattr(ablation, "train", lambda config: Outcome(1, stopped=True))
    assert main([path, "--seeds", "2"]) == 3  # of the third row


@pytest.mark.slow(reason="times the decoding of every row")
def test_every_rows_decoding_is_timed(home):
    model = Variant("plt", 2).apply(parse([write(home, "runs")])[1].model)
    timed = ablation.time_decoding(model, ROWS, 2, DecodeSettings(tokens=2, rounds=1))["rows"]
    timed = {row["label"]: row for row in timed}
    assert set(timed) == {variant.label for variant in ROWS}
    assert timed["no_loop-2x_layers"]["kv_bytes"] == 2 * timed["no_loop"]["kv_bytes"]
    read = {label: row["weight_bytes_read"] for label, row in timed.items()}
    assert read["no_loop-2x_layers"] == read["vanilla_loop-2"]
    assert read["no_loop"] == read["clp-2"] < read["vanilla_loop-2"]


def test_a_stopped_row_ends_it(home, monkeypatch):
    begun = []
    outcome = Outcome(1, stopped=True)
    monkeypatch.setattr(ablation, "train", lambda config: begun.append(config) or outcome)
    assert main([write(home, "stopped"), "--seeds", "1"]) == 3
    assert len(begun) == 1


def test_a_run_that_a_neighbour_is_making_is_passed_over(home):
    _, config = parse([write(home, "beside")])
    begun = home / "beside" / "plt-2" / "seed_0"
    begun.mkdir(parents=True)
    (begun / "config.yaml.tmp").write_text("")
    assert list(ablation.rows(config)) == []


@pytest.mark.slow(reason="trains several runs")
def test_synthetic_tasks_are_scored_by_their_answers(home):
    task = {"task": "addition", "difficulties": [1, 2], "test_difficulties": [1, 2, 3]}
    sections = {"data": {"synthetic": task}, "training": {"steps": 2}}
    words = ["--seeds", "1", "--rows", "no_loop"]
    main([write(home, "sums", **sections), *words])
    (row,) = json.loads((home / "sums" / "ablation.json").read_text())["rows"]
    assert [one["difficulty"] for one in row["runs"][0]["by_difficulty"]] == [1, 2, 3]
    text = (home / "sums" / "ablation.txt").read_text()
    assert "difficulty     1     2    3*" in text
    assert (home / "sums" / "difficulties.png").exists()
    sections["data"]["synthetic"]["test_difficulties"] = [2]  # tested anew, of the same run
    before = (home / "sums" / "no_loop" / "seed_0" / "metrics.jsonl").read_text()
    main([write(home, "sums", **sections), *words])
    assert (home / "sums" / "no_loop" / "seed_0" / "metrics.jsonl").read_text() == before
    (row,) = json.loads((home / "sums" / "ablation.json").read_text())["rows"]
    assert [one["difficulty"] for one in row["runs"][0]["by_difficulty"]] == [2]
    for option, old, new in (("data.synthetic.length", 32, 31), ("training.steps", 2, 3)):
        message = rf"another config \({option}: {old} -> {new}\)"
        with pytest.raises(InputError, match=message):
            main([write(home, "sums", **sections), *words, f"--{option}", str(new)])


def report_of(scores):
    """As ablation.json, of given scores by row and seed."""
    return {
        "command": "ablate",
        "task": "none",
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


def synthetic_report(tested, rights):
    """A report of runs that answered so many problems correctly, by row and seed, then difficulty.

    Args:
      tested: of each difficulty, how many problems and whether it was trained on.
    """
    report = report_of(
        {label: dict.fromkeys(range(len(runs)), 0) for label, runs in rights.items()}
    )
    for row, runs in zip(report["rows"], rights.values(), strict=True):
        for run, right in zip(row["runs"], runs, strict=True):
            run["by_difficulty"] = [
                {"difficulty": level, "questions": n, "trained": known, "accuracy": found / n}
                for (level, (n, known)), found in zip(tested.items(), right, strict=True)
            ]
    return report | {"task": "addition"}


def test_answers_are_weighed_by_problems_and_listed_by_difficulty(tmp_path):
    tested = {1: (10, True), 2: (90, True), 5: (100, False)}
    rights = {"no_loop": [(10, 30, 0), (8, 42, 10)], "vanilla_loop-2": [(10, 80, 50), (9, 81, 30)]}
    report = synthetic_report(tested, rights)
    found = ablation_report.differences(report, "vanilla_loop-2", "no_loop")
    assert found == pytest.approx([0.5, 0.3])
    lines = ablation_report.write(report, tmp_path).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("difficulty ")) :]
    assert table[0].split() == ["difficulty", "1", "2", "5*"]
    assert table[1].split() == ["no_loop", "90.0%", "40.0%", "5.0%"]
    assert table[2].split() == ["+-", "14.1%", "9.4%", "7.1%"]
    assert table[-2].split() == ["problems", "10", "90", "100"]
    assert table[-1] == "* not trained on"
    assert (tmp_path / "difficulties.png").exists()


def test_a_report_of_unseen_difficulties_and_uneven_curves(tmp_path):
    report = synthetic_report({9: (10, False)}, {"plt-2": [(3,), (4,)]})
    report["rows"][0]["runs"][0]["curve"] = [[1, 2.0], [2, 1.5], [3, None]]
    report["rows"][0]["runs"][1]["curve"] = [[1, 2.0], [3, 1.0]]
    assert "plt-2" in ablation_report.write(report, tmp_path)


def test_a_run_whose_loss_is_no_number_is_said_to_be_none(tmp_path):
    text = ablation_report.write(report_of({"no_loop": {0: 1.5, 1: None}}), tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("no_loop "))
    assert line.split()[-2:] == ["nan", "nan"]


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
