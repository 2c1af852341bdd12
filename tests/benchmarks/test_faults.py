"""The campaign of faults: its own parts, and one fault that needs no training."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import campaign, signals
from benchmarks.faults.kinds import FAULTS
from benchmarks.faults.sandbox import ProcessExit, RunResult, Sandbox, damage
from benchmarks.faults.trial import Trial, require, require_error_line
from tests.training.runs import REPOSITORY, assert_refused, command, environment


def test_at_least_fifty_faults_are_tried():
    assert sum(times for _, times in FAULTS.values()) >= 50


def test_the_campaign_ends_with_its_bucket():
    # A thread of the emulator that is left keeps a process from ending.
    program = (
        "from benchmarks.faults.buckets import bucket_server, stop_bucket_server; "
        "bucket_server(); stop_bucket_server(); stop_bucket_server(); print('ends')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "ends\n"


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_damage_is_done(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    done = damage(path, kind, random.Random(1))
    assert "file" in done
    if kind == "missing":
        assert not path.exists()
    else:
        assert path.read_bytes() != bytes(range(100))
        assert (len(path.read_bytes()) == 100) == (kind == "flipped")


@pytest.mark.parametrize(
    ("ended", "message"),
    [
        (ProcessExit(1, "error: the disk is full"), "exit code 1 instead of 2"),
        (ProcessExit(2, "Traceback\nerror: the disk"), "there is a stack trace"),
        (ProcessExit(2, "error: one\nerror: two"), "2 error lines instead of one"),
        (ProcessExit(2, "error: something else"), "'disk' is not in the error"),
    ],
)
def test_what_is_not_the_one_right_message_is_a_failure(ended, message):
    with pytest.raises(AssertionError, match=message):
        require_error_line(ended, 2, "disk")
    right = ProcessExit(2, "a warning\nerror: disk full")
    assert require_error_line(right, 2, "disk") == "error: disk full"


def test_a_fault_that_goes_wrong_is_reported_and_the_campaign_goes_on():
    def wrong(trial):
        require(False, "the parameters differ")

    def broken(trial):
        raise OSError("no such device")

    assert campaign.judge(None, wrong)["ok"] is False
    assert campaign.judge(None, wrong)["outcome"] == "the parameters differ"
    assert "no such device" in campaign.judge(None, broken)["outcome"]
    rows = {
        name: {"kind": "disk read-only", "ok": ok, "outcome": name}
        for name, ok in (("one", True), ("two", False))
    }
    lines = [line.split() for line in campaign.table(rows).splitlines()]
    assert lines[1] == ["disk", "read-only", "2", "1", "one"]
    assert lines[-1] == ["all", "2", "1"]


@pytest.mark.slow(reason="starts processes")
def test_a_killed_preparation_is_gone_on_with(tmp_path):
    sandbox = Sandbox(tmp_path / "home")
    trial = Trial(sandbox, RunResult([], ""), "one", random.Random(0))
    assert "went on to the same corpus" in signals.kill_preparation(trial)
    Path(sandbox.corpus / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not a tokenized corpus"):
        signals.kill_preparation(trial._replace(name="two"))


def test_an_unknown_kind_is_refused(tmp_path):
    words = ["--out", tmp_path, "--only", "earthquake"]
    result = command("benchmarks.faults", *words)
    assert_refused(result, "no kind is called so; known are SIGKILL at a random moment")
