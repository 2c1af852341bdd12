"""The page on a training run: its numbers on made-up runs, and what it shows of a real one."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from plt_jax.config import RunConfig
from plt_jax.reports.run_numbers import (
    BETWEEN,
    UNDONE,
    Series,
    make_history,
    means,
    restart_steps,
    series,
    smooth,
    summarize,
    thin,
    what_stands_out,
)
from plt_jax.reports.run_page import compose, heading, key_numbers, write_report
from plt_jax.reports.run_plots import draw_sections
from tests.training.runs import STEPS, assert_refused, command

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # and run as a command

REPORT = "plt_jax.training.report"
NAN = float("nan")
CONFIG = RunConfig.model_validate({"model": {"moe": {"experts": 4, "dense_layers": 1}}})
BEGAN = 1_790_000_000.0


def clocked(step, time, **seconds) -> dict:
    """A row of training, written some seconds after BEGAN, with seconds by phase."""
    clock = {f"seconds/{phase}": value for phase, value in seconds.items()}
    return {"step": step, "time": BEGAN + time, "loss": 2.0, **clock}


def evaluated(step, time, loss=2.0) -> dict:
    row = {"step": step, "validation_loss": loss, "bits_per_byte": loss / 2}
    return {**row, "validation_tokens": 100, "time": BEGAN + time}


def rolled_back(step, undone, time) -> dict:
    return {"step": step, "rolled_back_from": step + undone, "time": BEGAN + time}


def spent(*rows) -> dict[str, float]:
    """Seconds by phase of a run, after a check that they are all of its time."""
    history = make_history(CONFIG, list(rows))
    first = next(row for row in history.rows if row["clock"])
    whole = history.rows[-1]["time"] - first["time"] + sum(first["clock"].values())
    assert sum(history.spent.values()) == pytest.approx(whole)
    return history.spent


def test_the_wall_time_of_an_undisturbed_run_is_that_of_its_newest_row():
    rows = [
        clocked(10, 5, starting=1, compiling=3, steps=1),
        clocked(20, 8, starting=1, compiling=3, steps=4),
    ]
    assert spent(*rows) == {"starting": 1, "compiling": 3, "steps": 4}
    assert spent(*rows, evaluated(20, 10)) == {
        **{"starting": 1, "compiling": 3, "steps": 4, "evaluation": 2}
    }


def test_what_lies_between_starts_is_counted_apart():
    rows = [
        clocked(10, 5, starting=1, steps=4),
        clocked(20, 10, starting=2, steps=8),
        evaluated(20, 12),
        # It went on to step 29 or so, was killed, and began anew after 100 seconds.
        clocked(30, 105, starting=1, steps=4),
        clocked(40, 110, starting=1, steps=9),
    ]
    history = make_history(CONFIG, rows)
    assert [len(start) for start in history.starts] == [3, 2]
    assert restart_steps(history.starts) == [20]
    assert spent(*rows) == {"starting": 3, "steps": 17, "evaluation": 2, BETWEEN: 88}
    assert summarize(history).goodput == pytest.approx(17 / 110)
    assert summarize(history).restarts == 1


def test_a_start_that_is_slow_to_its_first_row_is_told_from_the_one_before():
    """Its seconds are more than those of the row before, but fewer than have gone by."""
    rows = [
        clocked(10, 5, starting=1, steps=4),
        clocked(20, 65, starting=40, steps=8),
        clocked(30, 70, starting=40, steps=13),
    ]
    assert len(make_history(CONFIG, rows).starts) == 2
    assert spent(*rows) == {"starting": 41, "steps": 17, BETWEEN: 12}
    # The same seconds at a time at which they are one start's.
    rows[1]["time"], rows[2]["time"] = BEGAN + 48, BEGAN + 53
    assert spent(*rows) == {"starting": 40, "steps": 13}


def test_a_start_may_evaluate_before_it_logs():
    rows = [
        clocked(20, 10, starting=1, steps=9),
        evaluated(25, 107),
        clocked(40, 110, starting=1, steps=9),
    ]
    history = make_history(CONFIG, rows)
    assert [[row["step"] for row in start] for start in history.starts] == [[20], [25, 40]]
    assert spent(*rows) == {"starting": 2, "steps": 18, BETWEEN: 90}


def test_steps_that_a_rollback_undid_are_not_good_ones():
    rows = [
        clocked(20, 20, steps=20),
        rolled_back(20, 30, 50),
        rolled_back(20, 40, 90),
        clocked(30, 100, steps=100),
    ]
    assert spent(*rows) == {"steps": pytest.approx(30), UNDONE: pytest.approx(70)}
    history = make_history(CONFIG, rows)
    assert summarize(history).goodput == pytest.approx(0.3)
    assert [one.undone for one in summarize(history).rollbacks] == [30, 40]
    # Killed before another row, it leaves the time alone to judge by.
    assert spent(*rows[:2]) == {"steps": 20, UNDONE: 30}
    begun_anew = clocked(30, 160, steps=10)
    assert spent(*rows[:2], begun_anew) == {"steps": 30, UNDONE: 30, BETWEEN: 100}
    # The first thing of a start, after it resumed at step 20.
    late = [rolled_back(20, 30, 180), clocked(30, 190, steps=40)]
    assert spent(rows[0], *late) == {
        **{"steps": pytest.approx(30), UNDONE: pytest.approx(30), BETWEEN: 130}
    }


def test_clocks_without_times_say_nothing_of_what_lies_between():
    rows = [clocked(10, 0, steps=4), clocked(20, 0, steps=8), clocked(30, 0, steps=3)]
    for row in rows:
        del row["time"]
    history = make_history(CONFIG, rows)
    assert history.spent == {"steps": 11} and summarize(history).restarts == 1


def test_rows_without_clocks_tell_no_wall_time():
    history = make_history(CONFIG, [{"step": 1, "loss": 2.0, "goodput": 0.5}])
    assert history.spent == {}
    summary = summarize(history)
    assert summary.goodput is summary.seconds is summary.restarts is None
    assert "wall time" not in [name for name, _, _ in key_numbers(CONFIG, summary)]


def test_a_series_is_of_the_rows_that_have_it():
    rows = [
        {"step": 1, "a": 2.0, "b": [[1.0, None]]},
        {"step": 2},
        {"step": 3, "a": None, "b": [[3.0, 4.0]], "none": None},
    ]
    steps_R, values_R = series(rows, "a")
    assert steps_R.tolist() == [1, 3]
    assert values_R[0] == 2.0 and np.isnan(values_R[1])
    assert series(rows, "b").values_R.shape == (2, 1, 2)
    assert series(rows, "none") is series(rows, "missing") is None


def test_thinning_keeps_every_spike():
    values_R = np.sin(np.arange(100_000) / 1e4)
    values_R[[0, 777, 50_000, 99_999]] = [9.0, -8.0, 7.0, -6.0]
    values_R[20_000:30_000] = NAN
    thinned = thin(Series(np.arange(100_000), values_R), 1000)
    assert 900 < len(thinned.steps_R) <= 1002
    assert np.isnan(thinned.values_R).any()
    assert (np.diff(thinned.steps_R) > 0).all()
    assert {0, 777, 50_000, 99_999} <= set(thinned.steps_R.tolist())
    assert np.array_equal(thinned.values_R, values_R[thinned.steps_R], equal_nan=True)
    short = Series(np.arange(3), np.array([1.0, NAN, 2.0]))
    assert thin(short) is short


def test_smoothing_is_a_median_of_what_is_finite():
    full = Series(np.arange(6), np.array([1.0, 2.0, NAN, NAN, NAN, 8.0]))
    assert smooth(full).values_R.tolist() == pytest.approx([1.5, 1.5, 2, NAN, 8, 8], nan_ok=True)
    values_R = np.ones(10_000)
    values_R[5_000:5_005] = 100.0
    smoothed = smooth(Series(np.arange(10_000), values_R), 100)
    assert len(smoothed.steps_R) == 100 and (smoothed.values_R == 1).all()


def test_means_are_over_stretches_of_rows():
    values_RJ = np.array([[1.0, 2.0], [3.0, NAN], [5.0, NAN], [7.0, NAN]])
    found = means(Series(np.array([10, 20, 30, 40]), values_RJ), 2)
    assert found.edges.tolist() == [0, 20, 40]
    assert found.values_C[:, 0].tolist() == [2, 6]
    assert found.values_C[0, 1] == 2 and np.isnan(found.values_C[1, 1])
    assert means(Series(np.array([7]), np.array([1.0]))).edges.tolist() == [6, 7]


def test_what_stands_out_is_said():
    assert what_stands_out(*told({"step": 1, "loss": 2.0})) == []
    said = what_stands_out(
        *told(
            {**clocked(10, 10, steps=4, data=6), "skipped": 3.0},
            evaluated(10, 10, 2.0),
            rolled_back(10, 12, 20),
            {**clocked(20, 30, steps=8, data=22), "loss": None, "expert_dropped": 0.25},
            evaluated(20, 30, 2.5),
        )
    )
    assert len(said) == 6
    assert said[0] == "The newest loss, at step 20, is not a finite number."
    assert said[1] == "Held-out loss was best at step 10, 2.0000, and is 2.5000 now."
    assert said[2].startswith("Up to 25.00% of the choices of experts")
    assert said[3].startswith("3 of 20 steps changed nothing")
    assert said[4].startswith("Rollbacks: 1, over 12 steps in all, each after 10")
    assert said[5].endswith("73% into: waiting for data.")


def told(*rows):
    history = make_history(CONFIG, list(rows))
    return history, summarize(history)


def full_rows(count, every=10):
    """Rows with all names that a run may write, of two loops and three layers with experts."""
    draw = np.random.default_rng(0)
    noise = draw.uniform(0.5, 1.5, (count, 3)).tolist()
    rows = []
    for index, (one, two, three) in enumerate(noise, start=1):
        passed = 3.0 * index
        rows.append(
            {
                **clocked(index * every, passed + 5, starting=5.0, steps=passed),
                **{"loss": one + 2, "gradient_norm": two, "learning_rate": 1e-3, "skipped": 0.0},
                **{f"gradient_norm/layers.{name}": two for name in "qkvo"},
                **{f"update_norm/layers.{name}": three for name in "qkvo"},
                **{"tokens_per_second": 1e5 * one, "model_tflops_per_second": 9.0, "mfu": 0.4},
                **{"gate_by_loop": [[0.5, 0.4, 0.3, one / 2]], "hidden_norm_by_loop": [one, two]},
                **{"experts_per_step": 2.5, "expert_load_entropy": 0.9, "expert_max_load": 0.4},
                "expert_dropped": 0.0,
                "expert_load_entropy_by_loop": [[0.9, 0.8, 0.7]] * 2,
                "expert_max_load_by_loop": [[0.4, 0.3, 0.3]] * 2,
                "expert_dropped_by_loop": [[0.0, 0.0, 0.0]] * 2,
                "router_z_by_loop": [[one, two, three]] * 2,
            }
        )
    return rows


def titles(*rows) -> list[str]:
    """Of the sections that there are; all figures are sound XML."""
    sections = draw_sections(make_history(CONFIG, list(rows)))
    for section in sections:
        ElementTree.fromstring(section.svg)
    return [section.title for section in sections]


ALL = [
    *["Losses", "Learning rate", "Gradient norm", "Norms by parameter", "Gates"],
    *["Hidden states by loop", "Experts", "Experts by loop and layer", "Speed"],
    "Where the wall time went",
]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_all_that_a_run_may_write_is_drawn(count, recwarn):
    assert titles(*full_rows(count)) == ALL
    assert not [str(warning.message) for warning in recwarn]


def test_what_is_not_there_is_left_out(recwarn):
    assert titles({"step": 1, "loss": None}) == []
    assert titles(rolled_back(3, 5, 1)) == []
    assert titles({"step": 1, "validation_loss": 2.0, "bits_per_byte": 1.0}) == ["Losses"]
    old = {"step": 1, "loss": 2.0, "gradient_norm": None, "tokens_per_second": 0.0}
    assert titles(old, {**old, "step": 2, "loss": None}) == ["Losses"]
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("gradient_norm/layers.q", "Norms by parameter"),
        ("update_norm/layers.q", "Norms by parameter"),
        ("gate_by_loop", "Gates"),
        ("hidden_norm_by_loop", "Hidden states by loop"),
        ("expert_max_load", "Experts"),
        ("router_z_by_loop", "Experts by loop and layer"),
        ("mfu", "Speed"),
        ("seconds/steps", "Where the wall time went"),
    ],
)
def test_one_name_makes_a_section(name, section):
    rows = [{"step": row["step"], "loss": None, name: row[name]} for row in full_rows(3)]
    assert titles(*rows) == [section]


def test_numbers_that_are_not_finite_leave_gaps(recwarn):
    rows = full_rows(30)
    for name in set(rows[0]) - {"step", "time", "clock"}:
        if not name.startswith("seconds/"):
            value = rows[3][name]
            rows[3][name] = (np.full_like(value, None, object)).tolist() if value else None
    rows[3]["skipped"] = 2.0
    assert titles(*rows) == ALL
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.slow(reason="draws the figures of a long run")
def test_long_runs_make_small_pages():
    rows = full_rows(100_000)
    rows += [evaluated(step, 3e5 + step) for step in range(1_000_000, 1_020_000)]
    page = compose("long", make_history(CONFIG, rows), [["step"]])
    assert page.count("<figure>") == len(ALL)
    assert len(page) < 2_000_000


def test_names_are_escaped():
    config = RunConfig.model_validate({"data": {"source": "<b>&amp;'\""}})
    row = {"step": 1, "loss": 2.0, "gradient_norm/<i>$a_b&\"'": 1.0}
    page = compose("<u>run</u> & $x_1$", make_history(config, [row]), [["step"], ["<s>"]])
    assert "<title>&lt;u&gt;run&lt;/u&gt; &amp; $x_1$</title>" in page
    assert not re.search("<[bius]>", page)
    assert "trained on &lt;b&gt;&amp;amp;" in page and "<td>&lt;s&gt;</td>" in page
    assert "&lt;i&gt;$a_b&amp;" in page


class Page(HTMLParser):
    """Collects what a page refers to, its headings, and its text."""

    def __init__(self, text):
        super().__init__()
        self.references, self.headings, self.text, self.tags = [], [], "", set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.headings += [""] if tag in ("h1", "h2") else []
        self.references += [
            value for name, value in attributes if name in ("src", "href", "xlink:href")
        ]

    def handle_data(self, data):
        self.text += data
        if self.headings and not self.headings[-1]:
            self.headings[-1] = data


@pytest.fixture
def run(finished, tmp_path):
    finished.copy(tmp_path / "run")
    return tmp_path / "run"


def test_a_real_run_makes_a_page_that_needs_nothing_else(run, finished):
    result = command(REPORT, run)
    assert result == (0, f"written to {run / 'report.html'}\n", "")
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.headings[:5] == [
        *["run", "What stands out", "Checkpoints", "Losses", "Learning rate"]
    ]
    assert {"Gradient norm", "Norms by parameter", "Speed"} <= set(page.headings)
    assert not {"script", "link", "img"} & page.tags
    assert all(part.startswith(("#", "data:image/png;base64,")) for part in page.references)
    assert "plt, 2 loops through 2 layers of width 8, 5,344 parameters" in page.text
    assert f"{STEPS}of {STEPS}, finished" in " ".join(page.text.split()).replace(" of", "of")
    assert page.text.count("complete") == 2
    assert "layers.gate_weight" in page.text
    lines = heading(make_history(finished.config, [{"step": 1}]))
    assert len(lines) == 2 and lines[1].endswith("seed 0")


def test_a_page_may_go_elsewhere_and_is_replaced(run, tmp_path):
    target = tmp_path / "page.html"
    assert write_report(run / "checkpoints" / str(STEPS), target) == target
    target.write_text("old")
    assert command(REPORT, run, "--out", target).code == 0
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not (run / "report.html").exists()


def test_what_cannot_be_drawn_or_written_is_refused(run, tmp_path):
    assert_refused(command(REPORT, tmp_path / "none"), "none does not exist")
    assert_refused(command(REPORT, tmp_path), "neither a run directory nor a checkpoint")
    assert_refused(command(REPORT, run, "--out", tmp_path), f"--out {tmp_path} is a folder")
    missing = tmp_path / "missing" / "page.html"
    assert_refused(command(REPORT, run, "--out", missing), f"cannot write {missing}: No such file")
    assert_refused(command(REPORT, run, "--into", "x"), "unknown option --into")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "metrics.jsonl holds no row yet"),
        ('{"step": 1', "metrics.jsonl holds no row yet"),
        ('{"step": 1}\n[1]\n', "line 2 of "),
        ('{"loss": 2.0}\n', "is no row of metrics: it has no step"),
        ('{"step": 1, "loss": "low"}\n', "loss in metrics.jsonl is not numbers of one shape"),
        (b"\xff\n", "metrics.jsonl is damaged"),
    ],
)
def test_metrics_that_are_none_are_refused(run, text, part):
    (run / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(command(REPORT, run), part)
    assert not (run / "report.html").exists()


def test_a_run_without_checkpoints_or_with_new_names_is_drawn(run):
    (run / "checkpoints").rename(run / "elsewhere")
    rows = [{"step": 1, "loss": 2.0, "some": "thing", "seconds/new": 2.0, "time": BEGAN}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(REPORT, run).code == 0
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert "None is saved yet." in text and ">new<" in (run / "report.html").read_text()
