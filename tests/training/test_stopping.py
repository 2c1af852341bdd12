"""Several processes stop after the same step, whichever is told to and however far each is."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.distributed import processes
from plt_jax.errors import FailedError, MissingProcessError
from plt_jax.training import stopping
from plt_jax.training.stopping import CoordinatedStop


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """The texts that processes have put into the store, as JAX's coordination service keeps it."""
    stored = {}
    monkeypatch.setattr(processes, "put", stored.__setitem__)
    monkeypatch.setattr(processes, "get", stored.get)

    def get_all(folder):
        names = [key for key in list(stored) if key.startswith(f"{folder}/")]
        return {key.split("/")[-1]: stored[key] for key in names}

    monkeypatch.setattr(processes, "get_all", get_all)
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.002)
    return stored


class Devices:
    """The devices of all processes: a step is computed once all have begun it."""

    def __init__(self, count: int):
        self._begun, self._condition = [0] * count, threading.Condition()

    def begin(self, index: int, step: int) -> None:
        with self._condition:
            self._begun[index] = step
            self._condition.notify_all()

    def wait(self, step: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: min(self._begun) >= step, timeout=30), step


def train(stop, devices: Devices, index: int, steps: int, ahead: int, pause: float):
    """A process that begins steps up to `ahead` before it waits for the devices."""
    with stop:
        for step in range(1, steps + 1):
            devices.begin(index, step)
            if step > ahead:
                devices.wait(step - ahead)
            time.sleep(pause)
            if stop.should_stop(step):
                return step
    return steps


def run_together(count, steps, ahead, told):
    """The last steps of processes of which some are told to stop when they have begun a step."""
    devices, ends = Devices(count), [None] * count
    # Keys are numbered by process here as by run there: all must have the same.
    number = next(stopping._numbers)

    def run(index):
        def requested():
            return index in told and devices._begun[index] >= told[index]

        stop = CoordinatedStop(requested, 0, 30, index, count)
        stop._key = f"stop/{number}"
        ends[index] = train(stop, devices, index, steps, ahead[index], 0.0003 * (index + 1))

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return ends


@settings(max_examples=40, deadline=None)
@given(
    ahead=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    told=st.dictionaries(st.integers(0, 3), st.integers(1, 60), min_size=1),
)
def test_all_stop_after_the_same_step(ahead, told):
    told = {index % len(ahead): step for index, step in told.items()}
    ends = run_together(len(ahead), 60, ahead, told)
    assert len(set(ends)) == 1
    assert ends[0] >= min(told.values()) - max(ahead) - 1


def test_they_stop_soon():
    ends = run_together(3, 100_000, [1, 0, 2], {1: 5})
    assert ends[0] < 100_000


def test_without_a_notice_all_come_to_the_end():
    assert run_together(3, 30, [1, 1, 1], {}) == [30, 30, 30]


def test_one_process_alone_decides_by_itself(store):
    asked = iter([False, True])
    with CoordinatedStop(lambda: next(asked), 0, 1) as stop:
        assert [stop.should_stop(step) for step in (1, 2)] == [False, True]
    assert store == {}


def test_a_process_that_does_not_answer_is_named():
    def wait_for_the_end():
        with CoordinatedStop(lambda: True, 0, patience=0, index=0, count=2) as stop:
            while not stop.should_stop(1):
                time.sleep(0.001)

    with pytest.raises(MissingProcessError, match="process 1 of 2 does not say where it stops"):
        wait_for_the_end()


def test_a_process_that_ends_answers_those_that_still_run(store):
    with CoordinatedStop(lambda: False, 7, 30, index=1, count=2) as ended:
        assert not ended.should_stop(8)
    with CoordinatedStop(lambda: True, 7, 30, index=0, count=2) as stop:
        stop._key = ended._key
        while not any(name.endswith("step/0") for name in store):
            time.sleep(0.001)
        assert not stop.should_stop(8)  # the other is at 8, and neither can be told before 9
        assert stop.should_stop(9)


@pytest.mark.parametrize("told", [False, True])
def test_where_one_fails_the_others_end_with_its_message(store, monkeypatch, capsys, told):
    """Whether or not they have agreed on where to stop."""
    ended = threading.Event()

    def end(code):
        assert code == 1
        ended.set()
        raise MissingProcessError("this process would be gone")

    monkeypatch.setattr(stopping.os, "_exit", end)
    failing = CoordinatedStop(lambda: told, 0, 30, index=1, count=2)

    def fail():
        with failing:
            while told and len(store) < 3:  # the notice and two steps
                time.sleep(0.001)
            raise FailedError("cannot save\nthe checkpoint")

    other = CoordinatedStop(lambda: False, 0, 30, index=0, count=2)
    other._key = failing._key
    with other:
        with pytest.raises(FailedError):
            fail()
        assert ended.wait(timeout=30)
    # Said until the process ends, which this one does not.
    assert set(capsys.readouterr().err.splitlines()) == {
        "error: process 1 of 2: cannot save the checkpoint"
    }
