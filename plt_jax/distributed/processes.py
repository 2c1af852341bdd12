"""Several processes that train one model: how they find one another, agree, and wait.

Of one process nothing here does anything. On TPU pods and under Slurm JAX finds the others by
itself; elsewhere `processes.coordinator`, `.count` and `.index` say who they are.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; orbax and others use it so too
from jax.experimental import multihost_utils

from plt_jax.config import ProcessesConfig
from plt_jax.errors import InputError, MissingProcessError

SHUTDOWN_SECONDS = 30
"""How long a process that ends waits for the others, and how much longer than we JAX waits for
them: when it loses patience, it aborts with a stack trace."""


def start(config: ProcessesConfig) -> None:
    """Joins the other processes, if there are any; call it before anything that needs devices.

    All but the first process print nothing from then on; errors still reach stderr.

    Raises:
      InputError: some of the processes did not come in time, which are named.
    """
    if jax.distributed.is_initialized() or not (config.coordinator or announced()):
        return
    settings = {
        "initialization_timeout": config.timeout + SHUTDOWN_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    if config.coordinator:
        call_roll(config.coordinator, config.count, config.index, config.timeout)
        settings |= {
            "coordinator_address": config.coordinator,
            "num_processes": config.count,
            "process_id": config.index,
            "cluster_detection_method": "deactivate",
        }
    # It would swallow SIGTERM, which training handles by itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _patience(config.timeout):
            jax.distributed.initialize(**settings)
    except (ValueError, RuntimeError) as error:
        if not config.coordinator and not several_announced():
            return  # TPU chips without metadata, or another device: nobody speaks of others
        raise InputError(
            f"JAX does not find the other processes ({' '.join(str(error).split())[:200]}); say "
            "who is who with processes.coordinator, processes.count and processes.index"
        ) from error
    _client().key_value_set(f"host/{jax.process_index()}", socket.gethostname())
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end


def announced() -> bool:
    """Whether this process may be one of several: the environment says so, or there are TPU chips,
    whose machine's metadata JAX asks."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_SKIP_MDS_QUERY" in os.environ:
        chips = []  # the environment says who there is, or that there is nobody to ask
    wanted = os.environ.get("JAX_PLATFORMS") or "tpu"
    return several_announced() or (bool(chips) and "tpu" in wanted)


def several_announced() -> bool:
    """Whether the environment says that this process is one of several."""
    counts = ["OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"]
    if "SLURM_STEP_NODELIST" in os.environ:
        counts.append("SLURM_NTASKS")  # set in a job's own shell too, where nobody else runs
    several = any(os.environ.get(name, "1") not in ("", "0", "1") for name in counts)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def first() -> bool:
    """Whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether there is only this process."""
    return jax.process_count() == 1


def barrier(what: str, timeout: int) -> None:
    """Waits until all processes have come here.

    Args:
      what: what they have done then, for the message.
      timeout: seconds.

    Raises:
      MissingProcessError: some did not; names them.
    """
    if alone():
        return
    try:
        _client().wait_at_barrier(f"plt_jax/{what}/{next(_numbers)}", timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            reason = " ".join(str(error).split())[:300]
            raise MissingProcessError(f"a process was lost before {what}: {reason}") from error
        raise MissingProcessError(
            f"{_missing(str(error))} did not come to the point where {what}, for {timeout} s; look "
            "at its output, or raise processes.timeout"
        ) from error


@contextlib.contextmanager
def together(what: str, timeout: int) -> Iterator[None]:
    """Runs a block in every process, and fails in all of them if it fails in one.

    Raises:
      InputError: the block's, here or elsewhere; or see `barrier`.
    """
    if alone():
        yield
        return
    key = f"plt_jax/{what}/{next(_numbers)}"
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    message = "" if problem is None else str(problem) or type(problem).__name__
    _client().key_value_set(f"{key}/{jax.process_index()}", message)
    barrier(what, timeout)
    if problem is not None:
        raise problem
    for index in range(jax.process_count()):
        message = _client().blocking_key_value_get(f"{key}/{index}", timeout * 1000)
        if message:
            raise InputError(f"{_name(index)}: {message}")


def agree(values: dict[str, str], timeout: int) -> None:
    """Checks that values are the same in all processes.

    Args:
      values: by what they are.
      timeout: seconds to wait for the other processes.

    Raises:
      InputError: a process has another than the first; says which value.
    """
    if alone():
        return
    key = f"plt_jax/agree/{next(_numbers)}"
    with together("values are compared", timeout):
        if first():
            _client().key_value_set(key, json.dumps(values))
        right = json.loads(_client().blocking_key_value_get(key, timeout * 1000))
        for name, value in values.items():
            if value != right[name]:
                raise InputError(f"the {name} here is not that of process 0; give all the same")


def publish(key: str, text: str) -> None:
    """Tells all processes a text, under a key; of several the last counts. From any thread.

    Raises:
      MissingProcessError: the first process, which keeps it, is gone.
    """
    try:
        _client().key_value_set(f"plt_jax/{key}", text, allow_overwrite=True)
    except jax.errors.JaxRuntimeError as error:
        raise _first_lost(error) from error


def look_up(key: str) -> str | None:
    """The text that some process has published under a key; None if there is none yet.

    Raises:
      MissingProcessError: the first process, which keeps it, is gone.
    """
    try:
        return _client().key_value_try_get(f"plt_jax/{key}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise _first_lost(error) from error


def look_up_all(folder: str) -> dict[str, str]:
    """What processes have published under keys `folder/NAME`, by name.

    Raises:
      MissingProcessError: the first process, which keeps it, is gone.
    """
    try:
        entries = _client().key_value_dir_get(f"plt_jax/{folder}/")
    except jax.errors.JaxRuntimeError as error:
        raise _first_lost(error) from error
    return {key.split("/")[-1]: text for key, text in entries}


def gather(key: str, text: str, timeout: int) -> list[str]:
    """In the first process a text from every one, in their order; in the others nothing.

    Unlike the rest it may be called from any thread, and so in any order: all must give the same
    key, `WHAT/NUMBER`, which is used once.

    Raises:
      MissingProcessError: one did not come within `timeout` seconds.
    """
    if alone():
        return [text]
    folder = f"plt_jax/{key}"
    _client().key_value_set(f"{folder}/{jax.process_index()}", text)
    texts = []
    for index in range(jax.process_count() if first() else 0):
        try:
            texts.append(_client().blocking_key_value_get(f"{folder}/{index}", timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise MissingProcessError(
                f"{_name(index)} did not give its {key.split('/')[0]} for {timeout} s; look at its "
                "output, or raise processes.timeout"
            ) from error
    if first():
        _client().key_value_delete(folder)
    return texts


def told_by_first(text: str, timeout: int) -> str:
    """The first process's text, in all of them.

    Raises:
      MissingProcessError: it did not say it within `timeout` seconds.
    """
    if alone():
        return text
    key = f"plt_jax/told/{next(_numbers)}"
    if first():
        _client().key_value_set(key, text)
    try:
        return _client().blocking_key_value_get(key, timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise _first_lost(error) from error


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process; all must ask."""
    if alone():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def call_roll(coordinator: str, count: int, index: int, timeout: int) -> None:
    """Waits until all processes have reported to the first, at the address that JAX takes later.

    JAX, waiting by itself, aborts without saying in one line who is missing.

    Raises:
      InputError: some did not come in time, or the address is none of this machine's.
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
        absent = answer
    else:
        absent = _collect(int(port), count, deadline)
    if absent:
        plural = "es" if len(absent) > 1 else ""
        raise InputError(
            f"process{plural} {', '.join(map(str, absent))} of {count} did not come to "
            f"{coordinator} for {timeout} s; start them, or correct processes.count and .index"
        )


def _collect(port: int, count: int, deadline: float) -> list[int]:
    """Waits for reports; tells all that came who is missing, and returns it."""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"cannot listen at port {port} ({error.strerror}); choose another in "
            "processes.coordinator"
        ) from error
    absent, callers = set(range(1, count)), []
    with server:
        while absent and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller, _ = server.accept()
                caller.settimeout(5)
                absent.discard(int(caller.makefile().readline()))
            except (TimeoutError, ValueError, OSError):
                continue  # nobody, or not one of ours
            callers.append(caller)
        for caller in callers:
            with contextlib.suppress(OSError), caller:
                caller.sendall((json.dumps(sorted(absent)) + "\n").encode())
    return sorted(absent)


def _report(host: str, port: int, index: int, deadline: float) -> list[int] | None:
    """Reports to process 0 and waits for its answer, who is missing; None if it is not there."""
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
def _patience(timeout: int) -> Iterator[None]:
    """Ends the process with one line where JAX would abort it later."""

    def give_up() -> None:
        print(
            f"error: not all processes came within {timeout} s; see which of them did not start, "
            "or raise processes.timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_numbers = itertools.count()
"""Barriers and keys are used once each; processes meet in the same order at all of them."""


def _client():
    return distributed.global_state.client


def _first_lost(error: Exception) -> MissingProcessError:
    return MissingProcessError(f"process 0 was lost: {' '.join(str(error).split())[:300]}")


def _name(index: int) -> str:
    """A process, with the host that it said it is on."""
    try:
        host = _client().blocking_key_value_get(f"host/{index}", 1000)
    except jax.errors.JaxRuntimeError:
        host = "unknown"
    return f"process {index} of {jax.process_count()} (host {host})"


def _missing(message: str) -> str:
    """The processes that a barrier's error calls late."""
    names = message.split("timed out task names:")[-1]
    late = re.findall(r"^\s*(?:/job:\S*task:)?(\d+)\s*$", names.split("RPC")[0], re.MULTILINE)
    if not late:
        return " ".join(message.split())[:300] + ": some process"
    return ", ".join(_name(int(index)) for index in late)
