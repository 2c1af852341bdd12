"""What is printed while training, and how speed is measured."""

import time
from unittest import mock

import pytest

from plt_jax.training.progress import ProgressReport, Speedometer, peak_memory


@pytest.fixture
def clock():
    """Stands in for the clock; `clock.return_value` is the time."""
    with mock.patch.object(time, "monotonic", return_value=100.0) as monotonic:
        yield monotonic


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines(capsys, clock):
    with ProgressReport(10, 40) as report:
        report.say("step 10: [bold]not markup[/bold], " + "long " * 60)
        clock.return_value = 160.0
        report.advance(20, 1.23456, 2.5, 1234.5)
    out = capsys.readouterr().out
    first, second = out.splitlines()
    assert first == "step 10: [bold]not markup[/bold], " + "long " * 60
    # Ten steps took a minute, so the twenty to go take two.
    assert second == "step 20/40  loss 1.235  2.500 bits/byte  1,234 tokens/s  2.0 min left"
    assert "\x1b" not in out


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressReport(10, 40) as report:
        report.say("a line above it")
        report.advance(20, 1.23456, 2.5, 1234.5)
    out = capsys.readouterr().out
    assert "a line above it" in out
    assert "step 20/40" in out
    assert "loss 1.235  2.500 bits/byte  1,234 tokens/s" in out


def test_speed_leaves_out_the_first_step_and_pauses(clock):
    speed = Speedometer(tokens_per_step=50)
    assert not speed.started
    assert speed.median() == 0.0
    clock.return_value = 130.0
    speed.start(1)
    assert speed.started
    assert speed.mark(1) == 0.0
    clock.return_value = 132.0
    with speed.paused():
        clock.return_value = 190.0
    clock.return_value = 192.0
    assert speed.mark(3) == pytest.approx(2 * 50 / 4)
    clock.return_value = 193.0
    assert speed.mark(5) == pytest.approx(100.0)
    clock.return_value = 195.0
    assert speed.mark(6) == pytest.approx(25.0)
    assert speed.median() == pytest.approx(25.0)


def test_peak_memory_is_in_bytes():
    # JAX alone takes more than 50 MB, and no test machine has 10 TB.
    assert 5e7 < peak_memory() < 1e13
