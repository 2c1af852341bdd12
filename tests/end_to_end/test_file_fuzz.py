"""Changed files: each is read, or refused in one line, within bounds of time and memory.

`PLT_FILE_FUZZ=5000 pytest -s tests/end_to_end/test_file_fuzz.py` tries as many, from another seed
(PLT_FILE_FUZZ_SEED), and prints each.
"""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.training.runs import REPOSITORY, environment

CASES = 96
"""In a plain run of the tests: six of each kind."""


@pytest.mark.slow(reason="starts a process whose memory is bounded")
def test_a_changed_file_is_read_or_refused_in_one_line(tmp_path):
    cases = int(os.environ.get("PLT_FILE_FUZZ", CASES))
    seed = int(os.environ.get("PLT_FILE_FUZZ_SEED", time.time() if cases != CASES else 0))
    words = [tmp_path / "home", "--cases", cases, "--seed", seed]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.end_to_end.file_fuzz_worker", *map(str, words)],
        **{"cwd": REPOSITORY, "env": environment(JAX_PLATFORMS="cpu")},
        **{"stdout": subprocess.PIPE, "text": True},
    )
    rows = []
    with process:
        for line in process.stdout:
            print(line, end="", flush=True)
            rows.append(json.loads(line))
    assert process.returncode == 0, f"ended by {rows[-1]}"
    assert [row for row in rows if "failure" in row] == []
    assert rows[-1]["cases"] == cases
    assert rows[-1]["read"] > 0 and rows[-1]["refused"] > cases // 3
