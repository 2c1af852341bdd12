"""Commands answer --help and refuse options before they import JAX, which takes seconds."""

import subprocess
import sys

import pytest

COMMANDS = [
    "train",
    "eval",
    "generate",
    "serve",
    "convert",
    "describe",
    "checkpoint",
    "compile",
    "data.prepare",
    "data.verify",
    "training.report",
]

CODE = """
import atexit, runpy, sys

module, *words = sys.argv[1:]
sys.argv[1:] = words
atexit.register(lambda: print("jax" in sys.modules, file=sys.stderr))
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--no_such_option", 2)])
def test_jax_is_not_imported_before_arguments_are_parsed(command, word, code):
    done = subprocess.run(
        [sys.executable, "-c", CODE, f"plt_jax.{command}", word],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done
    assert done.stderr.splitlines()[-1] == "False"
