"""One fault against one run, and what must be true afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.sandbox import ProcessExit, RunResult, Sandbox


class Trial(NamedTuple):
    """One fault, which is about to happen."""

    sandbox: Sandbox
    expected: RunResult
    """The result of a run that nothing disturbed."""
    name: str
    """The folder of its runs, below the sandbox's."""
    draw: random.Random
    """Draws moments, files and bits."""

    def new_run(self) -> tuple[Path, Path]:
        """Makes a run's folder, where a disk can be mounted; returns it and the configuration."""
        folder = self.sandbox.home / self.name / "run"
        folder.mkdir(parents=True)
        return folder, self.sandbox.config(self.name)

    def compare(self, config: Path) -> None:
        """Compares a finished run with the undisturbed one, bit for bit.

        Raises:
          AssertionError: they differ.
        """
        found = self.sandbox.result(config)
        require(found.rows == self.expected.rows, "the metrics differ from the undisturbed run's")
        require(found.parameters == self.expected.parameters, "the parameters differ")

    def finish(self, config: Path, *options: str) -> None:
        """Resumes a run to its end, and compares it with the undisturbed one.

        Raises:
          AssertionError: it does not end well, or they differ.
        """
        ended = self.sandbox.start(config, *options).wait()
        require(ended.code == 0, f"resuming ended with {ended.code}: {ended.error[-300:]}")
        self.compare(config)


Fault = Callable[[Trial], str]
"""Returns what happened; raises AssertionError if something else should have happened."""


def require(condition: bool, otherwise: str) -> None:
    """Raises AssertionError with the text `otherwise`, unless the condition holds."""
    if not condition:
        raise AssertionError(otherwise)


def require_error_line(ended: ProcessExit, code: int, *parts: str, alone: bool = True) -> str:
    """Checks that a process ended with an exit code and one error line that holds all parts.

    Args:
      alone: whether further error lines are refused.

    Returns:
      The line.

    Raises:
      AssertionError: it ended otherwise.
    """
    lines = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    require(ended.code == code, f"exit code {ended.code} instead of {code}: {ended.error[-300:]}")
    require(bool(lines), f"no error line: {ended.error[-300:]}")
    require(not alone or len(lines) == 1, f"{len(lines)} error lines instead of one")
    for part in parts:
        require(part in lines[0], f"{part!r} is not in the error {lines[0]!r}")
    require("Traceback" not in ended.error, "there is a stack trace")
    return lines[0]
