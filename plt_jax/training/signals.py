"""SIGTERM and SIGINT as a request to stop after the steps under way."""

from __future__ import annotations

import contextlib
import signal
from typing import Any


class StopRequest:
    """A context in which a first SIGTERM or SIGINT only sets `requested`; a second acts at once."""

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame: object) -> None:
        self.requested = True
        for other, handler in self._before.items():
            signal.signal(other, handler)
        # Python refuses to print where the signal has interrupted a print.
        with contextlib.suppress(RuntimeError):
            name = signal.Signals(number).name
            print(f"{name}: saving after the steps under way ...", flush=True)
