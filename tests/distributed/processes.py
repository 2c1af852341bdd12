"""Workers that see eight host devices: a process's number of devices is fixed when JAX starts."""

import json
import subprocess
import sys
from typing import Any

from tests.training.runs import REPOSITORY, environment, simulated


def run_worker(name: str, *words: object, optimized: bool = False) -> Any:
    """What a module of this folder prints as JSON when it runs on eight devices.

    Args:
      optimized: for programs that run for longer than they compile.
    """
    flags = {
        **simulated(8),
        # Compiles in two thirds of the time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if optimized else "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"tests.distributed.{name}", *map(str, words)],
        **{"cwd": REPOSITORY, "env": environment(**flags), "capture_output": True, "timeout": 500},
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
