"""Several processes that run one model: how they exchange text, agree, and wait for one another.

With a single process nothing here does anything. rendezvous.py connects the processes first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # see _client
from jax.experimental import multihost_utils

from plt_jax.errors import InputError, MissingProcessError


def is_first() -> bool:
    """Whether this is process 0, which prints and writes files for all."""
    return jax.process_index() == 0


def is_single() -> bool:
    """Whether this is the only process."""
    return jax.process_count() == 1


def publish_host() -> None:
    """Stores the name of this process's machine, for messages about this process."""
    _client().key_value_set(f"host/{jax.process_index()}", socket.gethostname())


def barrier(what: str, timeout: int) -> None:
    """Waits until all processes have reached this call.

    Args:
      what: a clause for the error message: what has happened when all processes are here.
      timeout: seconds.

    Raises:
      MissingProcessError: some processes did not come; the message names them.
    """
    if is_single():
        return
    try:
        _client().wait_at_barrier(f"plt_jax/{what}/{next(_numbers)}", timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            reason = " ".join(str(error).split())[:300]
            raise MissingProcessError(f"a process was lost before {what}: {reason}") from error
        raise MissingProcessError(
            f"{_late_processes(str(error))} did not come to the point where {what}, for {timeout} "
            "s; look at its output, or raise processes.timeout"
        ) from error


@contextlib.contextmanager
def fail_together(what: str, timeout: int) -> Iterator[None]:
    """Runs a block in every process; an error in one process fails the block in all of them.

    Args:
      what, timeout: see `barrier`.

    Raises:
      InputError: the block raised an error in another process. An error of the block in this
        process is raised as it is.
      MissingProcessError: see `barrier`.
    """
    if is_single():
        yield
        return
    key = f"plt_jax/{what}/{next(_numbers)}"
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
        if isinstance(error, InputError):
            error.in_all_processes = True
    message = "" if problem is None else str(problem) or type(problem).__name__
    _client().key_value_set(f"{key}/{jax.process_index()}", message)
    barrier(what, timeout)
    if problem is not None:
        raise problem
    for index in range(jax.process_count()):
        message = _client().blocking_key_value_get(f"{key}/{index}", timeout * 1000)
        if message:
            error = InputError(f"{_describe_process(index)}: {message}")
            error.in_all_processes = True
            raise error


def check_equal(values: dict[str, str], timeout: int) -> None:
    """Checks that values are the same in all processes.

    Args:
      values: the values, by what the error message calls them.
      timeout: seconds to wait for the other processes.

    Raises:
      InputError: a process has another value than process 0; the message says which.
    """
    if is_single():
        return
    key = f"plt_jax/equal/{next(_numbers)}"
    with fail_together("values are compared", timeout):
        if is_first():
            _client().key_value_set(key, json.dumps(values))
        right = json.loads(_client().blocking_key_value_get(key, timeout * 1000))
        for name, value in values.items():
            if value != right[name]:
                raise InputError(f"the {name} here is not that of process 0; give all the same")


def put(key: str, text: str) -> None:
    """Stores a text under a key, for all processes; it replaces an earlier one. Any thread may
    call it.

    Raises:
      MissingProcessError: process 0, which holds the store, is gone.
    """
    try:
        _client().key_value_set(f"plt_jax/{key}", text, allow_overwrite=True)
    except jax.errors.JaxRuntimeError as error:
        raise _first_lost(error) from error


def get(key: str) -> str | None:
    """The text that some process has stored under a key; None if there is none yet.

    Raises:
      MissingProcessError: process 0, which holds the store, is gone.
    """
    try:
        return _client().key_value_try_get(f"plt_jax/{key}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise _first_lost(error) from error


def wait_for(key: str, timeout: int) -> str:
    """The text that some process stores under a key within `timeout` seconds.

    Raises:
      MissingProcessError: none does.
    """
    try:
        return _client().blocking_key_value_get(f"plt_jax/{key}", timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise _first_lost(error) from error


def get_all(folder: str) -> dict[str, str]:
    """The texts that processes have stored under keys `folder/NAME`, by name.

    Raises:
      MissingProcessError: process 0, which holds the store, is gone.
    """
    try:
        entries = _client().key_value_dir_get(f"plt_jax/{folder}/")
    except jax.errors.JaxRuntimeError as error:
        raise _first_lost(error) from error
    return {key.split("/")[-1]: text for key, text in entries}


def gather(key: str, text: str, timeout: int) -> list[str]:
    """Collects a text of every process in process 0, ordered by process; the others get [].

    Unlike the other functions it may be called from any thread, and so in any order: all processes
    must give the same key, `WHAT/NUMBER`, and each key may be used once.

    Raises:
      MissingProcessError: a process did not send its text within `timeout` seconds.
    """
    if is_single():
        return [text]
    folder = f"plt_jax/{key}"
    _client().key_value_set(f"{folder}/{jax.process_index()}", text)
    texts = []
    for index in range(jax.process_count() if is_first() else 0):
        try:
            texts.append(_client().blocking_key_value_get(f"{folder}/{index}", timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise MissingProcessError(
                f"{_describe_process(index)} did not give its {key.split('/')[0]} for {timeout} s; "
                "look at its output, or raise processes.timeout"
            ) from error
    if is_first():
        _client().key_value_delete(folder)
    return texts


def broadcast(text: str, timeout: int) -> str:
    """The text of process 0, in all processes.

    Raises:
      MissingProcessError: process 0 did not send it within `timeout` seconds.
    """
    if is_single():
        return text
    key = f"plt_jax/broadcast/{next(_numbers)}"
    if is_first():
        _client().key_value_set(key, text)
    try:
        return _client().blocking_key_value_get(key, timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise _first_lost(error) from error


def all_refuse(seconds: float) -> bool:
    """Whether all processes call this within so many seconds: each has refused its input."""
    until = time.monotonic() + seconds
    try:
        put(f"refused/{jax.process_index()}", "")
        while len(get_all("refused")) < jax.process_count():
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
    except MissingProcessError:
        return False
    return True


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes must call it."""
    if is_single():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


_numbers = itertools.count()
"""Numbers of barriers and keys, each used once; processes call the functions above in the same
order."""


def _client() -> Any:
    """The client of JAX's coordination service: its key-value store and its barriers.

    JAX has no public name for it (jax.experimental.multihost_utils exchanges arrays through the
    devices, which cannot name a missing process, nor be used from a second thread). This is the
    only use of JAX's private modules; pyproject.toml bounds JAX's version because of it.
    """
    return distributed.global_state.client


def _first_lost(error: Exception) -> MissingProcessError:
    return MissingProcessError(f"process 0 was lost: {' '.join(str(error).split())[:300]}")


def first_host() -> str:
    """The name or address under which this process has reached process 0."""
    return str(distributed.global_state.coordinator_address).rpartition(":")[0]


def describe(index: int, host: str) -> str:
    """A process, with the name of its machine."""
    return f"process {index} of {jax.process_count()} (host {host})"


def _describe_process(index: int) -> str:
    try:
        host = _client().blocking_key_value_get(f"host/{index}", 1000)
    except jax.errors.JaxRuntimeError:
        host = "unknown"
    return describe(index, host)


def _late_processes(message: str) -> str:
    """The processes that the error message of a barrier lists as late."""
    names = message.split("timed out task names:")[-1]
    late = re.findall(r"^\s*(?:/job:\S*task:)?(\d+)\s*$", names.split("RPC")[0], re.MULTILINE)
    if not late:
        return " ".join(message.split())[:300] + ": some process"
    return ", ".join(_describe_process(int(index)) for index in late)
