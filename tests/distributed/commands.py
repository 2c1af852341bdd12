"""Commands that several processes of four simulated devices run together."""

import json
import subprocess
import sys
from collections.abc import Sequence

from tests.distributed.test_rendezvous import free_port
from tests.training.runs import REPOSITORY, Result, environment, simulated


def run_together(commands: Sequence[Sequence[object]], count: int = 2) -> list[list[Result]]:
    """How commands end in each process, one after the other; see command_worker.py."""
    port, workers = free_port(), []
    # Without most optimizations programs compile in two thirds of the time.
    flags = {**simulated(4), "HF_HUB_OFFLINE": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for index in range(count):
        at = {"coordinator": f"localhost:{port}", "count": count, "index": index, "timeout": 60}
        options = [word for name, value in at.items() for word in (f"--processes.{name}", value)]
        words = [[str(word) for word in one] for one in commands]
        spec = {"index": index, "options": options, "commands": words}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.command_worker", json.dumps(spec)],
                **{"cwd": REPOSITORY, "env": environment(**flags)},
                **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
            )
        )
    ended = []
    for worker in workers:
        _, err = worker.communicate(timeout=400)
        assert worker.returncode == 0, err[-3000:]
        (results,) = (json.loads(line) for line in err.splitlines() if line.startswith("[{"))
        ended.append([Result(**result) for result in results])
    return ended
