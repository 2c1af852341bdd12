"""A run that was stopped and resumed is, bit for bit, one that was not."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plt_jax.checkpoint.manifest import find_damage
from plt_jax.checkpoint.steps import list_steps
from plt_jax.data.load import load_data
from plt_jax.data.tokenizer import TOKENIZER
from plt_jax.runs.directory import open_trained
from plt_jax.runs.names import CHECKPOINTS, METRICS
from plt_jax.training import trainer
from tests.checkpoint.damage import forget_checksums
from tests.training.runs import (
    STEPS,
    assert_same_run,
    call_at,
    command,
    environment,
    losses,
    numbers,
    saved_state,
    snapshot,
    tiny_config,
    write_config,
)

pytestmark = pytest.mark.slow(reason="trains several runs")


@pytest.fixture(autouse=True)
def unhandled():
    """Makes a signal that the training loop leaves to others fail the test, not end the tests."""

    def fail(number, _):
        raise AssertionError(f"{signal.Signals(number).name} was not handled")

    before = {number: signal.signal(number, fail) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def steps_of(config) -> list[int]:
    return list_steps(Path(config.run_dir) / CHECKPOINTS)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("power cut")


def test_the_run_reads_more_than_one_epoch(finished):
    # So that the tests below resume on both sides of its border.
    about = load_data(finished.config).about[0]
    tokens = int(re.search(r"([\d,]+) tokens", about)[1].replace(",", ""))
    batches = (tokens - 1) // 16 / 4
    assert 5 <= batches < 6


@pytest.mark.parametrize(
    ("at", "stop"), [(3, terminate), (4, interrupt), (6, terminate)], ids=["3", "4", "6"]
)
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, at, stop, capsys):
    config = tiny_config(finished.home, tmp_path / "run")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with call_at(at, stop):
        assert trainer.train(config) == trainer.Outcome(at, stopped=True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert steps_of(config)[-1] == at
    assert f"stopped at step {at}, saved; run the same command" in capsys.readouterr().out
    assert trainer.train(config) == trainer.Outcome(STEPS, stopped=False)
    assert f"resuming at step {at} of {STEPS}" in capsys.readouterr().out
    assert_same_run(config, finished.config)


def test_a_run_stopped_twice_and_read_without_prefetch_goes_on_bit_for_bit(finished, tmp_path):
    config = tiny_config(finished.home, tmp_path / "run", data={"prefetch": 0})
    for at in (2, 5):
        with call_at(at, terminate):
            assert trainer.train(config).step == at
    trainer.train(tiny_config(finished.home, tmp_path / "run", data={"prefetch": 16}))
    assert_same_run(config, finished.config)


@pytest.mark.parametrize("optimizer", [{}, {"name": "muon", "momentum_dtype": "bfloat16"}])
def test_a_run_on_a_synthetic_task_goes_on_bit_for_bit(tmp_path, optimizer):
    task = {"task": "permutations", "difficulties": [1, 2, 3]}
    whole, config = (
        tiny_config(tmp_path, tmp_path / name, data={"synthetic": task}, optimizer=optimizer)
        for name in ("whole", "stopped")
    )
    trainer.train(whole)
    with call_at(5, terminate):
        assert trainer.train(config).stopped
    trainer.train(config)
    assert_same_run(config, whole)


def test_a_stop_at_the_last_step_is_the_end(finished, tmp_path):
    config = tiny_config(finished.home, tmp_path / "run")
    with call_at(STEPS, terminate):
        assert trainer.train(config) == trainer.Outcome(STEPS, stopped=False)
    assert_same_run(config, finished.config)


def test_a_failed_run_goes_on_from_its_last_checkpoint(finished, tmp_path):
    config = tiny_config(finished.home, tmp_path / "run")
    with call_at(6, fail), pytest.raises(RuntimeError, match="power cut"):
        trainer.train(config)
    assert steps_of(config) == [4]
    assert find_damage(tmp_path / "run" / CHECKPOINTS / "4") == []
    assert list(losses(config)) == [1, 2, 3, 4, 5, 6]
    trainer.train(config)
    assert_same_run(config, finished.config)


def test_a_run_that_failed_before_its_first_checkpoint_starts_again(finished, tmp_path):
    config = tiny_config(finished.home, tmp_path / "run")
    with call_at(2, fail), pytest.raises(RuntimeError, match="power cut"):
        trainer.train(config)
    assert steps_of(config) == []
    trainer.train(config)
    assert_same_run(config, finished.config)


def test_accumulated_steps_go_on_bit_for_bit(finished, tmp_path):
    whole, stopped = (
        tiny_config(finished.home, tmp_path / name, training={"accumulate": 2})
        for name in ("whole", "stopped")
    )
    trainer.train(whole)
    with call_at(5, terminate):
        trainer.train(stopped)
    trainer.train(stopped)
    assert_same_run(stopped, whole)
    assert losses(whole) == pytest.approx(losses(finished.config), rel=1e-4)
    assert list(losses(whole)) == list(range(1, STEPS + 1))


KILLED = """
import os, signal, sys, time
from pathlib import Path
import jax
from plt_jax.runs.configuration import load_config
from plt_jax.training import trainer
from tests.training.runs import call_at

config = load_config(sys.argv[1])

def kill():
    # The checkpoint of step 4 is written beside the steps.
    until = time.monotonic() + 60
    while not (Path(config.run_dir) / "checkpoints" / "4").exists() and time.monotonic() < until:
        time.sleep(0.01)
    with open(Path(config.run_dir) / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    os.kill(os.getpid(), signal.SIGKILL)

with call_at(6, kill):
    trainer.train(config)
"""


def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path):
    config = tiny_config(finished.home, tmp_path / "run")
    path = write_config(tmp_path / "config.yaml", config.model_dump())
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, path], env=environment(), capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    # A kill while step 8 is written leaves a folder of this form.
    directory = Path(config.run_dir) / CHECKPOINTS
    shutil.copytree(directory / "4", directory / "8.orbax-checkpoint-tmp")
    (directory / "8.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    assert steps_of(config) == [4]
    trainer.train(config)
    assert_same_run(config, finished.config)


SIGNALLED_TWICE = """
import os, signal, sys
from plt_jax.checkpoint import store
from plt_jax.commands.parser import run_command
from plt_jax.runs.configuration import load_config
from plt_jax.training import trainer
from tests.training.runs import call_at

number, take = signal.Signals[sys.argv[2]], store.take_checksums

def take_and_signal(checkpoint, names):
    taken = take(checkpoint, names)
    if checkpoint.name.startswith("6."):
        os.kill(os.getpid(), number)  # the second, while the step that the first saves is written
    return taken

store.take_checksums = take_and_signal
with call_at(6, lambda: os.kill(os.getpid(), number)):
    run_command(lambda: trainer.train(load_config(sys.argv[1])) and 0)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_while_saving_leaves_no_broken_checkpoint(finished, tmp_path, name):
    config = tiny_config(finished.home, tmp_path / "run")
    path = write_config(tmp_path / "config.yaml", config.model_dump())
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED_TWICE, path, name],
        **{"env": environment(), "capture_output": True, "timeout": 300},
    )
    assert f"{name}: saving after the steps under way" in ended.stdout.decode()
    assert ended.returncode not in (0, 3), ended.stderr.decode()
    # The first acts at once and ends all; of the second Python waits for the thread that saves.
    assert steps_of(config) == {"SIGTERM": [4], "SIGINT": [4, 6]}[name]
    for step in steps_of(config):
        assert find_damage(Path(config.run_dir) / CHECKPOINTS / str(step)) == []
    trainer.train(config)
    assert_same_run(config, finished.config)


def test_a_finished_run_says_so_and_changes_nothing(finished):
    before = snapshot(finished.directory)
    config = write_config(finished.home / "again.yaml", finished.config.model_dump())
    result = command("train.py", config)
    assert result.code == 0
    assert f"finished: {finished.directory} is at step {STEPS} of {STEPS}" in result.out
    assert snapshot(finished.directory) == before


def test_a_run_may_be_made_longer(finished, tmp_path):
    config = finished.copy(tmp_path / "run")
    before = numbers(config)
    training = config.training.model_copy(update={"steps": STEPS + 2})
    config = config.model_copy(update={"training": training})
    assert trainer.train(config) == trainer.Outcome(STEPS + 2, stopped=False)
    assert steps_of(config)[-1] == STEPS + 2
    assert numbers(config)[: len(before)] == before
    assert list(losses(config)) == list(range(1, STEPS + 3))
    assert open_trained(config.run_dir).config.training.steps == STEPS + 2


def test_a_refused_resume_changes_nothing(finished, tmp_path):
    config = finished.copy(tmp_path / "run")
    before = snapshot(tmp_path)
    path = write_config(finished.home / "other.yaml", config.model_dump())
    result = command("train.py", path, "--seed", "1")
    assert result.code == 2
    assert "seed: 0 -> 1" in result.err
    assert snapshot(tmp_path) == before


def test_a_resume_is_refused_if_the_text_has_changed(finished, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(finished.home / "corpus", home / "corpus")
    config = tiny_config(home, tmp_path / "run")
    with call_at(4, terminate):
        trainer.train(config)
    (home / "corpus" / "00.txt").write_text("other words altogether, and more of them: " * 9)
    before = snapshot(tmp_path / "run")
    result = command("train.py", tmp_path / "run" / "config.yaml")
    assert result.code == 2, result
    assert TOKENIZER in result.err or "text" in result.err
    assert snapshot(tmp_path / "run") == before


class AskedLate:
    """A stop request that arrives between the decision to save and the loop's next turn."""

    def __init__(self):
        self._reads = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def requested(self) -> bool:
        # Asked before the first step, and after it whether to save.
        self._reads += 1
        return self._reads > 2


def test_a_stop_at_any_moment_saves_the_step_that_it_names(finished, tmp_path, monkeypatch):
    config = tiny_config(finished.home, tmp_path / "run")
    monkeypatch.setattr(trainer, "StopRequest", AskedLate)
    outcome = trainer.train(config)
    assert outcome.stopped
    assert steps_of(config) == [outcome.step]


def test_the_state_is_all_there_is(finished):
    # What assert_same_run compares is not empty, nor the same at every step.
    saved = saved_state(finished.config)
    assert saved.step == STEPS == int(saved.optimizer["step"])
    assert (Path(finished.config.run_dir) / METRICS).read_text().count("\n") == STEPS + 2
    assert len(set(losses(finished.config).values())) == STEPS


def test_the_data_state_of_earlier_versions_is_read(finished, tmp_path):
    """They kept it as JSON, in a file of the process."""
    config = tiny_config(finished.home, tmp_path / "run")
    with call_at(4, terminate):
        assert trainer.train(config).stopped
    forget_checksums(tmp_path / "run" / CHECKPOINTS / "4")
    data = tmp_path / "run" / CHECKPOINTS / "4" / "data"
    shutil.rmtree(data)
    data.mkdir()
    (data / "process_0-of-1.json").write_text('{"next_index": 4}', encoding="utf-8")
    assert trainer.train(config).step == STEPS
    assert losses(config) == losses(finished.config)


def test_a_seed_gives_the_same_run_again_and_another_seed_another(finished, tmp_path):
    again = tiny_config(finished.home, tmp_path / "again")
    trainer.train(again)
    assert_same_run(again, finished.config)
    other = tiny_config(finished.home, tmp_path / "other", seed=1)
    trainer.train(other)
    assert all(loss != losses(finished.config)[step] for step, loss in losses(other).items())
