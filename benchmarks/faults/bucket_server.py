"""A bucket on this machine: an emulator of Google Cloud Storage behind a proxy.

The proxy adds what the emulator lacks, the generations of objects in its answers and writes on
condition of one, and what a real service has: answers that are late, lost, or errors.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from gcp_storage_emulator.server import create_server

BUCKET = "runs"
HOST = "127.0.0.1"


class Request(NamedTuple):
    """One call of the service."""

    method: str
    name: str
    """The object that is asked for, or written; "" for a listing."""


class Disturbance(NamedTuple):
    """What happens to a call."""

    status: int = 0
    """The error that is answered instead, an HTTP status; 0 for none."""
    lost: bool = False
    """Whether the connection is dropped after the call has been carried out."""
    dropped: bool = False
    """Whether the connection is dropped before that."""
    delay: float = 0.0
    """Seconds that the answer waits."""


class BucketServer:
    """A service with the bucket BUCKET. It is a context manager."""

    def __init__(self, disturb: Callable[[Request], Disturbance | None] = lambda _: None):
        """
        Args:
          disturb: says what happens to a call; None for nothing. It may be replaced at any time.
        """
        self.disturb = disturb
        self.requests: list[Request] = []
        """All calls so far."""
        self._emulator = create_server(HOST, 0, in_memory=True, default_bucket=BUCKET)
        self._proxy = _Server(self)
        self.one_at_a_time = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a process uses this service."""
        address = f"http://{HOST}:{self._proxy.server_port}"
        return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}

    def __enter__(self) -> BucketServer:
        for name in ("gcp_storage_emulator", "gcp_storage_emulator.storage"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._emulator.start()
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._emulator.stop()

    def call(
        self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Calls the emulator: the status, the headers and the content of its answer."""
        port = cast(Any, self._emulator)._api._httpd.server_port
        with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=60)) as connection:
            connection.request(method, target, body or None, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def generation(self, name: str) -> int:
        """The generation of an object; 0 if there is none."""
        target = f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}"
        status, _, content = self.call("GET", target)
        return int(json.loads(content)["generation"]) if status == 200 else 0


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, owner: BucketServer):
        self.owner = owner
        super().__init__((HOST, 0), _Handler)

    def handle_error(self, request, client_address) -> None:
        """Says nothing of clients that have been killed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def _answer(self) -> None:
        owner, body = self.server.owner, self._read_body()
        request = Request(self.command, self._object_name(body))
        owner.requests.append(request)
        happens = owner.disturb(request) or Disturbance()
        time.sleep(happens.delay)
        if happens.dropped:
            self._drop()
        elif happens.status:
            error = {"error": {"code": happens.status, "message": "disturbed"}}
            self._send(happens.status, [], json.dumps(error).encode())
        else:
            answer = self._carry_out(request, body)
            self._drop() if happens.lost else self._send(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer

    def _carry_out(self, request: Request, body: bytes):
        owner = self.server.owner
        wanted = parse_qs(urlsplit(self.path).query).get("ifGenerationMatch")
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("transfer-encoding", "content-length", "connection")
        }
        with owner.one_at_a_time:
            if wanted and owner.generation(request.name) != int(wanted[0]):
                error = {"error": {"code": 412, "message": "conditionNotMet"}}
                return 412, [], json.dumps(error).encode()
            status, fields, content = owner.call(request.method, self.path, body, headers)
            if request.method == "GET" and request.name:
                fields.append(("x-goog-generation", str(owner.generation(request.name))))
            return status, fields, content

    def _object_name(self, body: bytes) -> str:
        parts = urlsplit(self.path)
        inside = re.search(r"/o/([^/]+)", parts.path)
        if inside:
            return unquote(inside[1])
        query = parse_qs(parts.query)
        if "name" in query:
            return query["name"][0]
        # A multipart upload names it in its first part.
        metadata = re.search(rb"\r?\n\r?\n(\{.*?\})\r?\n--", body, re.DOTALL)
        return json.loads(metadata[1]).get("name", "") if metadata else ""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args) -> None:
        """Writes no line for each call."""
