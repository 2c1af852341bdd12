"""The engine's thread: it waits, works, stops in time, and says when it has failed."""

import threading
import time

import pytest

from plt_jax.serving.engine import Engine, EngineStoppedError
from plt_jax.serving.prefix_cache import PrefixCache
from plt_jax.serving.request import Finish, Request, SlotSampling
from plt_jax.serving.scheduler import Scheduler
from tests.serving.fake_slots import FakeSlots, Recorder, continuation


class Waiting(Recorder):
    """A listener that others can wait for."""

    def __init__(self):
        super().__init__()
        self.ended = threading.Event()

    def finish(self, why):
        super().finish(why)
        self.ended.set()


class SlowSlots(FakeSlots):
    """Slots whose steps take time."""

    def step(self, active_B, log_probabilities, longest):
        time.sleep(0.01)
        return super().step(active_B, log_probabilities, longest)


def make(slots):
    engine = Engine(Scheduler(slots, PrefixCache(slots.chunk, 1, 0), 100))
    engine.start()
    return engine


def submit(engine, prompt, new):
    request = Request(prompt, new, SlotSampling(), Waiting())
    engine.submit([request])
    return request.listener


def test_requests_of_many_threads_are_served():
    engine = make(FakeSlots(3, 64, 8))
    listeners = {}

    def send(number):
        listeners[number] = submit(engine, [number, 1], 20)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, listener in listeners.items():
        assert listener.ended.wait(20)
        assert listener.ids == continuation([number, 1], 20)
    engine.stop(within=5)
    assert not engine.is_alive


def test_a_stop_lets_texts_end_and_takes_no_more():
    engine = make(SlowSlots(1, 64, 8))
    running = submit(engine, [1], 10)
    engine.stop(within=20)
    assert running.ends == [Finish.LENGTH]
    with pytest.raises(EngineStoppedError):
        submit(engine, [1], 1)


def test_a_stop_ends_what_takes_too_long():
    engine = make(SlowSlots(1, 10_000, 8))
    listeners = [submit(engine, [1], 9_000), submit(engine, [2], 5)]
    time.sleep(0.1)
    engine.stop(within=0.1)
    assert [listener.ends for listener in listeners] == [[Finish.SHUTDOWN]] * 2


def test_an_error_of_the_device_ends_all_and_is_told():
    class Failing(FakeSlots):
        def step(self, active_B, log_probabilities, longest):
            raise RuntimeError("out of memory")

    slots, told = Failing(2, 64, 8), threading.Event()
    engine = Engine(Scheduler(slots, PrefixCache(8, 1, 0), 100))
    engine.on_failure = told.set
    engine.start()
    listeners = [submit(engine, [1], 5) for _ in range(4)]
    assert told.wait(20)
    assert [listener.ends for listener in listeners] == [[Finish.FAILED]] * 4
    assert str(engine.failure) == "out of memory"
    with pytest.raises(EngineStoppedError):
        submit(engine, [1], 1)
