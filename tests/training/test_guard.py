"""When a step is a spike, and when so many were skipped that training must go back."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.config import GuardConfig
from plt_jax.training.guard import LAG, Guard, Limits

WATCHFUL = GuardConfig(spike_deviations=6.0, window=20, patience=4)


def observe(guard: Guard, *steps: tuple[float, float, float]) -> None:
    for loss, norm, skipped in steps:
        values = {"loss": loss, "gradient_norm": norm, "skipped": skipped}
        guard.observe({name: np.float32(value) for name, value in values.items()})


def sound_steps(count: int, seed: int = 0) -> list[tuple[float, float, float]]:
    random = np.random.default_rng(seed)
    return [(3 + random.normal() / 10, 1 + random.normal() / 20, 0.0) for _ in range(count)]


def test_without_a_threshold_there_are_no_limits():
    guard = Guard(GuardConfig(window=8, patience=4))
    observe(guard, *sound_steps(60))
    assert guard.limits() == Limits()


def test_limits_begin_with_a_full_window_of_settled_steps():
    guard = Guard(WATCHFUL)
    for step, values in enumerate(sound_steps(40), start=1):
        observe(guard, values)
        assert (guard.limits() == Limits()) == (step < 20 + LAG)


def test_a_limit_lies_so_many_deviations_above_the_median():
    guard, steps = Guard(WATCHFUL), sound_steps(300)
    observe(guard, *steps)
    losses, norms, _ = np.array(steps, np.float32)[-20 - LAG : -LAG].T
    for limit, values in zip(guard.limits(), (losses, norms), strict=True):
        deviation = 1.4826 * np.median(np.abs(values - np.median(values)))
        assert limit == pytest.approx(np.median(values) + 6 * deviation, rel=1e-6)
    # And so, of a normal distribution, about so many of its standard deviations.
    many = Guard(WATCHFUL.model_copy(update={"window": 280}))
    observe(many, *steps)
    assert many.limits().loss == pytest.approx(3 + 0.6, abs=0.1)


def test_skipped_steps_do_not_count_for_limits():
    guard, other = Guard(WATCHFUL), Guard(WATCHFUL)
    steps = sound_steps(60)
    observe(guard, *steps)
    spoilt = [*steps[:50], (math.nan, math.inf, 1.0), *steps[50:]]
    observe(other, *spoilt)
    assert np.isfinite(other.limits()).all()
    # One sound step of the window has made place for it.
    assert other.limits() == pytest.approx(guard.limits(), rel=0.1)


@given(skipped=st.lists(st.booleans(), max_size=40))
def test_it_is_lost_when_the_last_settled_steps_were_all_skipped(skipped):
    guard = Guard(WATCHFUL)
    observe(guard, *[(1.0, 1.0, float(one)) for one in skipped])
    settled = skipped[:-LAG]
    assert guard.should_roll_back() == (len(settled) >= 4 and all(settled[-4:]))


@given(before=st.integers(0, 70), after=st.integers(0, 40))
def test_it_goes_on_from_its_state_as_if_nothing_had_been(before, after):
    steps = sound_steps(before + after)
    if before > 2:
        steps[2] = (math.nan, math.inf, 1.0)
    whole, first = Guard(WATCHFUL), Guard(WATCHFUL)
    observe(whole, *steps)
    observe(first, *steps[:before])
    second = Guard(WATCHFUL, json.loads(json.dumps(first.state())))
    observe(second, *steps[before:])
    assert second.limits() == whole.limits()
    assert second.should_roll_back() == whole.should_roll_back()
    assert second.state() == whole.state()


def test_skipped_steps_are_counted_once():
    guard = Guard(WATCHFUL)
    observe(guard, *[(1.0, 1.0, float(step % 3 == 0)) for step in range(10)])
    assert guard.take_skipped() == 4
    assert guard.take_skipped() == 0
    observe(guard, (1.0, 1.0, 1.0))
    assert guard.take_skipped() == 1


def test_going_back_counts_anew():
    guard = Guard(WATCHFUL)
    observe(guard, *sound_steps(30), *[(math.nan, 1.0, 1.0)] * 6)
    assert guard.should_roll_back()
    assert math.isnan(guard.decisive_step().loss)
    guard.forget_skipped()
    assert not guard.should_roll_back()
    sound = [[float(np.float32(value)) for value in step] for step in sound_steps(30)]
    assert guard.state() == sound[-len(guard.state()) :] != []
    observe(guard, *[(math.nan, 1.0, 1.0)] * (3 + LAG))
    assert not guard.should_roll_back()
    observe(guard, (math.nan, 1.0, 1.0))
    assert guard.should_roll_back()


def test_a_patience_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="patience 20 is above window 8"):
        GuardConfig(window=8, patience=20)
