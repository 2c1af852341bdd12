"""The page on a training run: its size, its escapes, and its content for a real run."""

import json
import re
from html.parser import HTMLParser

import pytest

from plt_jax.config import RunConfig
from plt_jax.reports.run_history import make_history
from plt_jax.reports.run_page import compose, heading, write_report
from tests.reports.rows import BEGAN, CONFIG, evaluated, full_rows
from tests.training.runs import STEPS, assert_refused, command

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # and run as a command

REPORT = "plt_jax.training.report"


@pytest.mark.slow(reason="draws the figures of a long run")
def test_long_runs_make_small_pages():
    rows = full_rows(100_000)
    rows += [evaluated(step, 3e5 + step) for step in range(1_000_000, 1_020_000)]
    page = compose("long", make_history(CONFIG, rows), [["step"]])
    assert page.count("<figure>") == 10
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
    assert page.headings[:5] == [*["run", "Findings", "Checkpoints", "Losses", "Learning rate"]]
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
        ('{"step": 1}\n[1]\n', "is damaged: line 2 is no row of metrics"),
        ('{"loss": 2.0}\n', "line 1 is no row of metrics: it has no step"),
        (
            '{"step": 1, "loss": "low"}\n',
            "is damaged: line 1 has a loss that is no number",
        ),
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
    assert "No checkpoint is saved yet." in text and ">new<" in (run / "report.html").read_text()
