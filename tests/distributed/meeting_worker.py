"""One of two processes that meet once: `python -m tests.distributed.meeting_worker PORT INDEX`.

The second dies before.
"""

import os
import sys

from plt_jax.commands.parser import run_command
from plt_jax.config import ProcessesConfig
from plt_jax.distributed import processes, rendezvous


def main() -> None:
    port, index = sys.argv[1:]
    rendezvous.initialize(
        ProcessesConfig(coordinator=f"localhost:{port}", count=2, index=int(index), timeout=3)
    )
    if index == "1":
        os._exit(9)
    with processes.fail_together("the configuration is checked", 3):
        pass


if __name__ == "__main__":
    run_command(main)
