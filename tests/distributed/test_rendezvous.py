"""Processes find one another, or say in one line which of them are missing."""

import socket
import time

import pytest

from plt_jax.config import ProcessesConfig
from plt_jax.distributed.rendezvous import may_be_several, wait_for_processes
from plt_jax.errors import InputError


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def test_a_process_that_never_comes_is_named():
    began = time.monotonic()
    address = f"localhost:{free_port()}"
    with pytest.raises(InputError) as refused:
        wait_for_processes(address, 3, 0, timeout=1)
    assert time.monotonic() - began < 5
    assert str(refused.value) == (
        f"processes 1, 2 of 3 did not come to {address} for 1 s; start them, or correct "
        "processes.count and .index"
    )
    with pytest.raises(InputError, match=f"process 0 of 3 was not reached at {address} for 1 s"):
        wait_for_processes(address, 3, 1, timeout=1)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at port {port}"):
            wait_for_processes(f"localhost:{port}", 2, 0, timeout=1)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # the shell of a job
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
        ({"TPU_WORKER_HOSTNAMES": "one"}, False),
    ],
)
def test_the_environment_announces_others(monkeypatch, variables, several):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert may_be_several() is several


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "here:1"}, "count is missing; give coordinator, count and index, or none"),
        ({"count": 2, "index": 0}, "coordinator is missing"),
        ({"coordinator": "here", "count": 2, "index": 0}, "coordinator is here; it must be HOST"),
        ({"coordinator": "here:0", "count": 2, "index": 0}, "it must be HOST:PORT"),
        ({"coordinator": "here:1", "count": 2, "index": 2}, "index 2 must be below count 2"),
    ],
)
def test_what_does_not_say_who_is_who_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ProcessesConfig(**values)
