"""Which checkpoints are kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.checkpoint.retention import reasons_to_keep
from plt_jax.config import CheckpointConfig

LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.5}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"keep": 1, "keep_best": 0}, {50: ["newest"]}),
        ({"keep": 2, "keep_best": 0}, {40: ["newest"], 50: ["newest"]}),
        ({"keep": 1, "keep_best": 1}, {20: ["best"], 50: ["newest"]}),
        ({"keep": 2, "keep_best": 2}, {20: ["best"], 40: ["newest", "best"], 50: ["newest"]}),
        (
            {"keep": 1, "keep_best": 1, "keep_every": 20},
            {20: ["best", "every 20"], 40: ["every 20"], 50: ["newest"]},
        ),
        ({"keep": 9, "keep_best": 0}, {step: ["newest"] for step in LOSSES}),
    ],
)
def test_reasons(values, expected):
    reasons = reasons_to_keep(LOSSES, CheckpointConfig(**values))
    assert list(reasons) == sorted(LOSSES)
    assert {step: why for step, why in reasons.items() if why} == expected


def test_of_equal_losses_the_later_is_best_and_no_number_is_none():
    config = CheckpointConfig(keep=1, keep_best=1)
    reasons = reasons_to_keep({1: 2.0, 2: 2.0, 3: float("nan"), 4: None}, config)
    assert reasons == {1: [], 2: ["best"], 3: [], 4: ["newest"]}


@given(
    losses=st.dictionaries(st.integers(0, 60), st.none() | st.floats(0, 9), min_size=1),
    keep=st.integers(1, 4),
    keep_best=st.integers(0, 3),
    keep_every=st.none() | st.integers(1, 9),
)
def test_removing_one_at_a_time_keeps_what_is_kept_at_once(losses, keep, keep_best, keep_every):
    """As a run does, which judges after every save what is left."""
    config = CheckpointConfig(keep=keep, keep_best=keep_best, keep_every=keep_every)
    left = {}
    for step in sorted(losses):
        left[step] = losses[step]
        reasons = reasons_to_keep(left, config)
        left = {step: loss for step, loss in left.items() if reasons[step]}
    at_once = [step for step, why in reasons_to_keep(losses, config).items() if why]
    assert sorted(left) == at_once
    assert max(losses) in left
