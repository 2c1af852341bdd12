"""How the processes that run one model find one another, before JAX connects them.

On TPU pods and under Slurm JAX finds the other processes by itself. Elsewhere
`processes.coordinator`, `processes.count` and `processes.index` say which they are.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from plt_jax.config import ProcessesConfig
from plt_jax.distributed import lifeline, processes
from plt_jax.errors import InputError

SHUTDOWN_SECONDS = 30
"""Seconds that a process waits for the others when it ends, and that JAX waits longer than this
module when it starts: JAX aborts with a stack trace where its own time runs out."""


def initialize(config: ProcessesConfig) -> None:
    """Connects this process with the others, if there are any.

    It must be called before anything that needs devices. From then on, only the first process
    prints; errors of all processes still reach stderr.

    Raises:
      InputError: some processes did not come in time; the message names them.
    """
    if jax.distributed.is_initialized() or not (config.coordinator or may_be_several()):
        return
    settings: dict[str, Any] = {
        "initialization_timeout": config.timeout + SHUTDOWN_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    if config.coordinator and config.count is not None and config.index is not None:
        wait_for_processes(config.coordinator, config.count, config.index, config.timeout)
        settings |= {
            "coordinator_address": config.coordinator,
            "num_processes": config.count,
            "process_id": config.index,
            "cluster_detection_method": "deactivate",
        }
    # JAX's preemption service would take SIGTERM away from training, which handles it by itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _exit_after(config.timeout):
            jax.distributed.initialize(**settings)
    except (ValueError, RuntimeError) as error:
        if not config.coordinator and not environment_names_several():
            return  # TPU chips without metadata, or another device: there are no other processes
        raise InputError(
            f"JAX does not find the other processes ({' '.join(str(error).split())[:200]}); set "
            "processes.coordinator, processes.count and processes.index"
        ) from error
    processes.publish_host()
    if not processes.is_single():
        lifeline.connect(config.timeout)
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end


def may_be_several() -> bool:
    """Whether this process may be one of several.

    It may be if the environment says so, or if there are TPU chips: JAX then asks the metadata
    server of their machine.
    """
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_SKIP_MDS_QUERY" in os.environ:
        chips = []  # the environment names the processes, or forbids to ask for them
    wanted = os.environ.get("JAX_PLATFORMS") or "tpu"
    return environment_names_several() or (bool(chips) and "tpu" in wanted)


def environment_names_several() -> bool:
    """Whether the environment says that this process is one of several."""
    counts = ["OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"]
    if "SLURM_STEP_NODELIST" in os.environ:
        counts.append("SLURM_NTASKS")  # a job's own shell, which runs one process, has it too
    several = any(os.environ.get(name, "1") not in ("", "0", "1") for name in counts)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def wait_for_processes(coordinator: str, count: int, index: int, timeout: int) -> None:
    """Waits until all processes have reported to process 0, at the address that JAX uses next.

    JAX would wait for them too, but it aborts without one line that names the missing ones.

    Args:
      coordinator: HOST:PORT of process 0.
      count: number of processes.
      index: which of them this one is.
      timeout: seconds.

    Raises:
      InputError: some processes did not come in time, or process 0 cannot listen at its port.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if index > 0:
        answer = _report(host, int(port), index, deadline)
        if answer is None:
            raise InputError(
                f"process 0 of {count} was not reached at {coordinator} for {timeout} s; start it, "
                "or correct processes.coordinator"
            )
        missing = answer
    else:
        missing = _collect_reports(int(port), count, deadline)
    if missing:
        plural = "es" if len(missing) > 1 else ""
        raise InputError(
            f"process{plural} {', '.join(map(str, missing))} of {count} did not come to "
            f"{coordinator} for {timeout} s; start them, or correct processes.count and .index"
        )


def _collect_reports(port: int, count: int, deadline: float) -> list[int]:
    """Waits for the other processes' reports; sends those that came the missing indices, and
    returns these."""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"cannot listen at port {port} ({error.strerror}); choose another in "
            "processes.coordinator"
        ) from error
    missing, connections = set(range(1, count)), []
    with server:
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                missing.discard(int(connection.makefile().readline()))
            except (TimeoutError, ValueError, OSError):
                continue  # nothing came, or it was no process of this run
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError), connection:
                connection.sendall((json.dumps(sorted(missing)) + "\n").encode())
    return sorted(missing)


def _report(host: str, port: int, index: int, deadline: float) -> list[int] | None:
    """Reports to process 0 and returns its answer, the missing indices; None if it does not
    answer."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(f"{index}\n".encode())
                connection.settimeout(max(deadline - time.monotonic(), 0) + 5)
                return json.loads(connection.makefile().readline())
        except (OSError, ValueError):
            time.sleep(0.2)
    return None


@contextlib.contextmanager
def _exit_after(timeout: int) -> Iterator[None]:
    """Ends the process with one line where the block takes longer; JAX would abort it later."""

    def end() -> None:
        print(
            f"error: not all processes came within {timeout} s; see which of them did not start, "
            "or raise processes.timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
