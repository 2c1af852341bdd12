"""Several processes train what one trains, save what one reads, and say who is missing."""

import json
import subprocess
import sys

import pytest

from plt_jax.checkpoint.manifest import MANIFEST, find_damage, read_manifest
from plt_jax.runs.names import CHECKPOINTS
from plt_jax.training import trainer
from tests.checkpoint.damage import files_of, flip_bit
from tests.distributed.test_rendezvous import free_port
from tests.training.runs import (
    REPOSITORY,
    environment,
    flat,
    losses,
    make_home,
    numbers,
    simulated,
    snapshot,
    tiny_config,
)
from tests.training.test_rollback import bad_data

pytestmark = pytest.mark.slow(reason="starts several processes that train together")

STOP, STEPS = 20, 24
TRAINING = {"steps": STEPS, "batch_size": 8, "evaluate_every": 10, "checkpoint_every": 10}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
"""Of two processes of four devices: each has all rows of its half of the batch."""
SHARED_ROWS = {"data": 1, "context": 4, "tensor": 2}
"""Where both processes hold parts of every row."""


def run_together(
    count: int, home, run_dir, mesh, *, broken=(), checkpoint=None, guard=None, **spec
) -> list[dict]:
    """Trains in processes of four devices each, and returns what each ended with.

    Args:
      broken: sections of the last process that differ, by name.
    """
    port, workers = free_port(), []
    for index in range(count):
        processes = {"timeout": 60}
        if count > 1:
            processes |= {"coordinator": f"localhost:{port}", "count": count, "index": index}
        sections = {"training": TRAINING, "mesh": mesh, "processes": processes}
        sections |= {"checkpoint": checkpoint or {}, "guard": guard or {}}
        if broken and index == count - 1:
            sections |= broken
        spec |= {"home": str(home), "run_dir": str(run_dir), "sections": sections}
        flags = simulated(4)
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.process_worker", json.dumps(spec)],
                **{"cwd": REPOSITORY, "env": environment(**flags)},
                **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
            )
        )
    ended = []
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err[-3000:]
        (result,) = (json.loads(line) for line in err.splitlines() if line.startswith("{"))
        ended.append(result | {"out": out})
    return ended


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("processes") / "home")


@pytest.fixture(scope="module")
def alone(home):
    """A run of one process and one device."""
    config = tiny_config(home, home / "alone", training=TRAINING)
    assert trainer.train(config).step == STEPS
    return config


@pytest.mark.parametrize("mesh", [MESH, SHARED_ROWS], ids=["own rows", "shared rows"])
def test_two_processes_train_and_one_goes_on(home, alone, mesh, tmp_path):
    """One of the two is told to stop: both do, at the same step."""
    ended = run_together(2, home, tmp_path / "run", mesh, stopped=1, stop_at=STOP)
    for result in ended:
        assert (result["step"], result["stopped"]) == (STOP, True)
    assert "devices: 8 cpu in 2 processes (data" in ended[0]["out"]
    assert ended[1]["out"] == ""
    config = tiny_config(home, tmp_path / "run", training=TRAINING)
    assert trainer.train(config).step == STEPS
    assert losses(config) == pytest.approx(losses(alone), rel=1e-5)
    for ours, right in zip(numbers(config), numbers(alone), strict=True):
        assert flat(ours) == pytest.approx(flat(right), rel=1e-4)


def test_one_process_trains_and_two_go_on(home, alone, tmp_path):
    """Not from the newest checkpoint, which is damaged where the second of them checks it."""
    (first,) = run_together(1, home, tmp_path / "run", {"data": 4}, stopped=0, stop_at=STOP)
    assert first["step"] == STOP
    newest = tmp_path / "run" / CHECKPOINTS / str(STOP)
    sizes = {name: file.size for name, file in read_manifest(newest).files.items()}
    name = sorted(sizes, key=lambda name: (-sizes[name], name))[1]
    flip_bit(newest / name)
    before = snapshot(tmp_path)
    ended = run_together(2, home, tmp_path / "run", MESH)
    damaged = f"the checkpoint {newest} is damaged: {name} has another checksum"
    assert ended[1]["error"].startswith(damaged)
    assert ended[0]["error"].startswith("process 1 of 2 (host ") and damaged in ended[0]["error"]
    assert snapshot(tmp_path) == before
    ended = run_together(2, home, tmp_path / "run", MESH, checkpoint={"skip_damaged": True})
    assert [result["step"] for result in ended] == [STEPS, STEPS]
    assert f"skipping: {damaged}" in ended[0]["out"]
    assert "resuming at step 10 of" in ended[0]["out"]
    assert "a sample:" in ended[0]["out"]
    config = tiny_config(home, tmp_path / "run", training=TRAINING)
    assert losses(config) == pytest.approx(losses(alone), rel=1e-5)
    # Both have taken checksums of what they wrote.
    last = tmp_path / "run" / CHECKPOINTS / str(STEPS)
    assert sorted([*read_manifest(last).files, MANIFEST]) == files_of(last)
    assert any("process_1" in name for name in files_of(last))
    assert find_damage(last) == []


def test_processes_roll_back_together(home, tmp_path):
    bad, guard = [11, 12, 13], {"patience": 2}
    ended = run_together(2, home, tmp_path / "two", MESH, bad=bad, guard=guard)
    assert [result["step"] for result in ended] == [STEPS, STEPS]
    assert "rolling back from step 15 to 10" in ended[0]["out"]
    config = tiny_config(home, tmp_path / "one", training=TRAINING, guard=guard)
    with bad_data(*bad):
        assert trainer.train(config).step == STEPS
    two = tiny_config(home, tmp_path / "two", training=TRAINING)
    assert losses(two) == pytest.approx(losses(config), rel=1e-5)


def test_what_one_process_refuses_stops_all_before_anything_is_written(home, tmp_path):
    before = snapshot(tmp_path)
    wrong = {"data": {"source": str(tmp_path / "nothing")}}
    ended = run_together(2, home, tmp_path / "run", MESH, broken=wrong)
    assert ended[0]["error"].startswith("process 1 of 2 (host ")
    assert ended[0]["error"].endswith(ended[1]["error"])
    assert "nothing" in ended[1]["error"]
    assert snapshot(tmp_path) == before


def test_processes_of_other_configurations_do_not_train_together(home, tmp_path):
    other = {"optimizer": {"learning_rate": 2e-2}}
    ended = run_together(2, home, tmp_path / "run", MESH, broken=other)
    message = "the configuration here is not that of process 0; give all the same"
    assert ended[1]["error"] == message
    assert ended[0]["error"].endswith(f"): {message}")
    assert not (tmp_path / "run").exists()


def test_a_process_that_dies_is_named_in_one_line():
    port = free_port()
    ended = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.meeting_worker", str(port), str(index)],
            **{"cwd": REPOSITORY, "env": environment(JAX_PLATFORMS="cpu")},
            **{"stderr": subprocess.PIPE, "text": True},
        )
        for index in range(2)
    ]
    err = ended[0].communicate(timeout=60)[1]
    ended[1].communicate(timeout=60)
    assert ended[0].returncode == 1
    lines = [line for line in err.splitlines() if "libtpu" not in line]
    (line,) = (line for line in lines if line.startswith("error: "))
    assert line.startswith("error: process 1 of 2 (host ")
    assert "has ended: it was killed, or its machine was lost" in line
    assert lines[-1] == line
