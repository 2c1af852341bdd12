"""Time by phase, and the line about one that hangs."""

import threading
import time

import pytest

from plt_jax.training.phases import DATA, SAVING, STARTING, Phases


class Clock:
    """A time that only tests move."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_time_goes_to_the_innermost_phase(monkeypatch):
    clock = Clock(monkeypatch)
    phases = Phases(None)
    with phases:
        clock.now += 1
        with phases.phase(DATA):
            clock.now += 2
            with phases.phase(SAVING):
                clock.now += 4
            clock.now += 8
        clock.now += 16
    assert phases.seconds() == {STARTING: 17, DATA: 10, SAVING: 4}


def test_time_counts_where_a_phase_fails(monkeypatch):
    clock = Clock(monkeypatch)
    phases = Phases(None)

    def fail():
        clock.now += 3
        raise OSError("full")

    with pytest.raises(OSError, match="full"), phases.phase(SAVING):
        fail()
    clock.now += 1
    assert phases.seconds() == {STARTING: 1, SAVING: 3}


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_phase_that_hangs_is_named_again_and_again(capfd):
    said = []

    def read() -> list[str]:
        said.extend(capfd.readouterr().err.splitlines())
        return said

    with Phases(0.05) as phases:
        phases.finish_step(7)
        with phases.phase(DATA):
            wait_for(lambda: len(read()) >= 2)
    for line in said:
        assert line.startswith("waiting for data has taken ")
        assert line.endswith(" s, after step 7, and goes on")


def test_what_goes_on_is_not_said_to_hang(capfd, monkeypatch):
    clock = Clock(monkeypatch)
    with Phases(10.0) as phases:
        for step in range(20):
            clock.now += 9
            phases.finish_step(step)
            time.sleep(0.002)
    assert capfd.readouterr().err == ""


def test_more_patience_than_threads_have_is_as_good_as_endless(capfd):
    with Phases(1e30) as phases:
        phases.finish_step(1)
        time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_its_thread_ends_with_it():
    before = threading.active_count()
    with Phases(1000.0):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
