"""What a process says and does when another one of its run has ended."""

import signal
import subprocess
import sys
import time

import pytest

from tests.distributed.test_rendezvous import free_port
from tests.training.runs import (
    REPOSITORY,
    environment,
    make_home,
    simulated,
    tiny_values,
    write_config,
)

pytestmark = pytest.mark.slow(reason="starts several processes that train together")

SECONDS = 20
"""Within which the others must have ended; they take one or two on a machine that is not busy."""


@pytest.fixture
def start(tmp_path):
    """Starts the processes of a run that takes long, with a device each, and waits until it
    trains."""
    processes = []

    def start(count: int) -> list[subprocess.Popen]:
        home = make_home(tmp_path / "home")
        training = {
            "steps": 10**6,
            "batch_size": 4 * count,
            "evaluate_every": 10**6,
            "log_every": 1,
        }
        training |= {"checkpoint_every": 5}
        values = tiny_values(home, training=training, mesh={"data": count})
        config = write_config(tmp_path / "run.yaml", values | {"run_dir": str(tmp_path / "run")})
        port = free_port()
        for index in range(count):
            words = ["--processes.coordinator", f"localhost:{port}", "--processes.timeout", "60"]
            words += ["--processes.count", str(count), "--processes.index", str(index)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "train.py", str(config), *words],
                    **{"cwd": REPOSITORY, "env": environment(**simulated(1))},
                    **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
                )
            )
        rows = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (rows.exists() and rows.read_text().count("\n") >= 4):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ended(process) -> list[str]:
    """The errors that a process says, which must end soon and with code 1.

    The collectives of CPUs may write of a broken connection, too.
    """
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_the_other_names_process_0_that_was_killed(start):
    """It holds the store and the heartbeats of all."""
    processes = start(2)
    processes[0].send_signal(signal.SIGKILL)
    (line,) = ended(processes[1])
    assert line.startswith("error: process 0 of 2 (host ")
    assert "has ended: it was killed, or its machine was lost; " in line


def test_all_others_name_it(start):
    """Only process 0 is connected with the one that ended."""
    processes = start(3)
    processes[2].send_signal(signal.SIGKILL)
    for process in processes[:2]:
        (line,) = ended(process)
        assert line.startswith("error: process 2 of 3 (host ")
