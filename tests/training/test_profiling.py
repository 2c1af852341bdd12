"""The traced window of a run's steps."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from plt_jax.config import RunConfig
from plt_jax.training import trainer
from plt_jax.training.profiling import ProfileWindow
from tests.training.runs import tiny_config


def run_window(directory, first, length, steps, resumed=0):
    """Takes steps around a window; what was said, and the traces that there are."""
    said = []
    with ProfileWindow(directory, first, length, said.append) as window:
        for number in range(resumed + 1, steps + 1):
            with window.step(number):
                (jnp.ones(3) * number).block_until_ready()
            if window.ends_with(number):
                window.end()
    return said, list(directory.rglob("*.xplane.pb"))


def steps_traced(path) -> list[int]:
    """The numbers of the steps that a trace names."""
    data = ProfileData.from_serialized_xspace(path.read_bytes())
    return sorted(
        value
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    )


def test_the_steps_of_the_window_are_traced(tmp_path):
    said, (trace,) = run_window(tmp_path, 3, 2, 6)
    assert steps_traced(trace) == [3, 4]
    assert said == [f"the profile is in {tmp_path}; TensorBoard shows it"]


@pytest.mark.slow(reason="trains a run of its own")
def test_a_window_that_a_stop_cuts_short_ends_with_the_run(tmp_path):
    _, (trace,) = run_window(tmp_path, 3, 9, 4)
    assert steps_traced(trace) == [3, 4]


@pytest.mark.parametrize(("first", "resumed"), [(None, 0), (3, 3), (9, 0)])
def test_outside_a_window_nothing_is_traced(tmp_path, first, resumed):
    assert run_window(tmp_path, first, 2, 6, resumed) == ([], [])


def test_a_profiler_that_is_taken_is_said_and_ends_nothing(tmp_path):
    jax.profiler.start_trace(tmp_path / "other")
    try:
        said, _ = run_window(tmp_path / "own", 1, 1, 2)
    finally:
        jax.profiler.stop_trace()
    assert len(said) == 1 and said[0].startswith("no profile: ")


@pytest.mark.slow(reason="trains a run of its own")
def test_a_run_writes_its_profile_among_its_events(finished, tmp_path, capsys):
    training = {"profile_from": 2, "profile_steps": 2, "steps": 4}
    config = tiny_config(finished.home, tmp_path / "run", training=training)
    trainer.train(config)
    (trace,) = (tmp_path / "run" / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb")
    assert steps_traced(trace) == [2, 3]
    assert "the profile is in" in capsys.readouterr().out


def test_a_window_behind_the_last_step_is_refused():
    with pytest.raises(ValueError, match="profile_from 9 is after the last step, 8"):
        RunConfig.model_validate({"training": {"steps": 8, "profile_from": 9}})
