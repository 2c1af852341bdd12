"""How a process learns at once that another one of the run has ended.

Every process keeps a connection to process 0. The operating system closes it with the process,
however that ends, so the other side notices within a second; a machine that vanishes is noticed
within a minute. JAX's own heartbeats take longer, and abort the process with a stack trace.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import jax

from plt_jax.distributed import processes
from plt_jax.errors import EXIT_FAILED, one_line

BYE = "bye"
"""What a process sends when it ends in order; whatever else it sends is why it failed."""
CONNECT_SECONDS = 10
"""Seconds until process 0 must answer, or a process that has connected must say which it is."""
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds of silence, seconds between probes, and probes without an answer, until a connection to a
machine that has vanished counts as closed."""

GRACE_SECONDS = 3
"""Seconds that a failing process waits for word of another one that has ended."""

_handlers: list[object] = []
"""Signal handlers, which must live as long as the process."""
_connections: dict[int, socket.socket] = {}
"""The connections of this process, by the process at the other end."""


def connect(timeout: int) -> None:
    """Connects this process with process 0, or as process 0 waits for the others.

    A process that cannot be reached is left to JAX's heartbeats.

    Args:
      timeout: seconds to wait until process 0 says where.

    Raises:
      MissingProcessError: it does not.
    """
    if processes.is_first():
        server, token = socket.create_server(("", 0)), secrets.token_hex(8)
        port = server.getsockname()[1]
        processes.put("lifeline", f"{port} {token} {socket.gethostname()}")
        _start(_accept, server, token)
    else:
        port, token, host = processes.wait_for("lifeline", timeout).split()
        try:
            address = (processes.first_host(), int(port))
            connection = socket.create_connection(address, CONNECT_SECONDS)
            hello = f"{token} {jax.process_index()} {socket.gethostname()}\n"
            connection.sendall(hello.encode())
        except OSError:
            return
        _keep(connection, 0)
        _start(_listen, connection.makefile(encoding="utf-8"), 0, host)
    _catch_aborts()
    atexit.register(leave)


def leave(reason: str = BYE) -> None:
    """Tells the others that this process ends, and in one line why, if it failed."""
    connections = dict(_connections)  # other threads change it
    _connections.clear()
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(f"{one_line(reason)}\n".encode())
            connection.shutdown(socket.SHUT_WR)


def _accept(server: socket.socket, token: str) -> None:
    """Takes the connections of the other processes; others, as of port scanners, are closed."""
    for connection in _incoming(server):
        with contextlib.suppress(OSError, ValueError):
            connection.settimeout(CONNECT_SECONDS)
            lines = connection.makefile(encoding="utf-8")
            given, index, host = lines.readline(500).split()
            if given == token and 0 < int(index) < jax.process_count():
                _keep(connection, int(index))
                _start(_listen, lines, int(index), host)
                continue
        connection.close()


def _incoming(server: socket.socket) -> Iterator[socket.socket]:
    while True:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            yield connection


def _keep(connection: socket.socket, index: int) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every operating system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _connections[index] = connection


def _listen(lines: TextIO, index: int, host: str) -> None:
    """Waits for the end of another process, and ends this one unless that was in order."""
    try:
        reason = lines.readline().strip()
    except (OSError, ValueError):
        reason = ""
    if reason == BYE:
        _connections.pop(index, None)
        return
    if not _connections:
        return  # this process is ending by itself
    # Process 0 passes on what it knows of the others, who are not connected with one another.
    passed_on = index == 0 and reason.startswith("process ")
    told = reason or "it was killed, or its machine was lost"
    what = reason if passed_on else f"{processes.describe(index, host)} has ended: {told}"
    _connections.pop(index, None)
    leave(what)
    print(
        f"error: {what}; this process cannot go on alone and ends, too; start all of them again "
        "as before; a run goes on from its newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    # An ordinary exit would wait for the devices, which wait for the other process.
    os._exit(EXIT_FAILED)


def _catch_aborts() -> None:
    """Lets the line about another process come before the end, where a library aborts this one.

    The collectives of CPUs, and JAX's heartbeats, abort a process whose connections break; that may
    happen before `_listen` has read of it. Python's own signal handlers run too late for that.
    """
    library = ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def wait_and_end(number: int) -> None:
        library.alarm(4 * GRACE_SECONDS)  # ends the process even if Python cannot run
        time.sleep(GRACE_SECONDS)
        print(
            "error: a library has aborted this process, see above; if it was one of several, look "
            "at the others' output",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)

    _handlers.append(wait_and_end)
    library.signal(signal.SIGABRT, wait_and_end)


def _start(run, *arguments) -> None:
    threading.Thread(target=run, args=arguments, name="lifeline", daemon=True).start()
