"""Requests to stop."""

import os
import signal

import pytest

from plt_jax.training.signals import StopRequest

NUMBERS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def received():
    """Signals that reach the handlers that were there before."""
    received = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in NUMBERS}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_asks_and_the_second_acts(received, capsys, number):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert received == []
        assert f"{number.name}: saving after the steps under way ..." in capsys.readouterr().out
        os.kill(os.getpid(), number)
        assert received == [number]


def test_a_signal_within_a_print_asks_too(received, monkeypatch):
    def reentrant(*_, **__):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with StopRequest() as stop:
        monkeypatch.setattr("builtins.print", reentrant)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


@pytest.mark.parametrize("asked", [False, True])
def test_the_handlers_from_before_are_restored(received, asked):
    handlers = [signal.getsignal(number) for number in NUMBERS]
    with StopRequest():
        assert [signal.getsignal(number) for number in NUMBERS] != handlers
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in NUMBERS] == handlers


def test_they_are_restored_after_an_error(received):
    handlers = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in NUMBERS] == handlers
