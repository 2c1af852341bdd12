"""What tests of several benchmarks share."""

import sys

import pytest


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter whose transformers takes a hundredth of a second a token."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!{sys.executable}
import json, sys
shape = json.loads(sys.argv[-1])
print(json.dumps({{"shape": shape}}), flush=True)
for line in sys.stdin:
    print(int(line) / 100, flush=True)
"""
    )
    path.chmod(0o755)
    return str(path)
