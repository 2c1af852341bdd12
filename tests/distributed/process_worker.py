"""One of several processes that train a run: `python -m tests.distributed.process_worker SPEC`.

SPEC is JSON: `home` and `run_dir`, `sections` of the run's configuration, and `stop_at`, the step
at which this process, if it is the one named by `stopped`, signals itself, and `bad`, batches
to spoil. Prints what the run prints, then how it ends to stderr, as JSON.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from plt_jax.distributed import processes
from plt_jax.errors import InputError
from plt_jax.training.trainer import train
from tests.training.runs import call_at, tiny_config
from tests.training.test_rollback import bad_data


def main(spec: dict) -> None:
    _keep_stdout_for_python()
    config = tiny_config(Path(spec["home"]), spec["run_dir"], **spec["sections"])
    signalled = contextlib.nullcontext()
    if spec.get("stopped") == (config.processes.index or 0):
        signalled = call_at(spec["stop_at"], lambda: stop(config.processes.count or 1))
    try:
        with signalled, bad_data(*spec.get("bad", ())):
            outcome = train(config)
    except InputError as error:
        print(json.dumps({"error": str(error)}), file=sys.stderr, flush=True)
        return
    print(json.dumps(outcome._asdict()), file=sys.stderr, flush=True)


def stop(count: int) -> None:
    """Signals this process, and goes on when all have told the others how far they are."""
    os.kill(os.getpid(), signal.SIGTERM)
    until = time.monotonic() + 60
    for index in range(count if count > 1 else 0):
        while processes.get(f"stop/0/step/{index}") is None and time.monotonic() < until:
            time.sleep(0.05)


def _keep_stdout_for_python() -> None:
    """Gloo's threads write to file descriptor 1, lines whole or not: make that stderr."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
