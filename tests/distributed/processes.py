"""Workers that see eight host devices: a process's number of devices is fixed when JAX starts."""

import json
import subprocess
import sys
from typing import Any

from tests.training.runs import REPOSITORY, environment


def run_worker(name: str, *words: object, optimized: bool = False) -> Any:
    """What a module of this folder prints as JSON when it runs on eight devices.

    Args:
      optimized: for programs that run for longer than they compile.
    """
    flags = {
        # One collective at a time: XLA's CPU devices wait for one another for ever where they begin
        # several in different orders, which happens on a busy machine.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "JAX_PLATFORMS": "cpu",
        # Compiles in two thirds of the time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if optimized else "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"tests.distributed.{name}", *map(str, words)],
        **{"cwd": REPOSITORY, "env": environment(**flags), "capture_output": True, "timeout": 500},
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
