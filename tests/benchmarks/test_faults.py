"""The campaign of faults: its own parts, and one fault that needs no training."""

import random
from pathlib import Path

import pytest

from benchmarks.faults import campaign, kinds
from benchmarks.faults.kinds import FAULTS, Case, require_line
from benchmarks.faults.sandbox import Ended, Outcome, Sandbox, damage
from tests.training.runs import assert_refused, command


def test_at_least_fifty_faults_are_tried():
    assert sum(times for _, times in FAULTS.values()) >= 50


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_damage_is_done(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    said = damage(path, kind, random.Random(1))
    assert "file" in said
    if kind == "missing":
        assert not path.exists()
    else:
        assert path.read_bytes() != bytes(range(100))
        assert (len(path.read_bytes()) == 100) == (kind == "flipped")


@pytest.mark.parametrize(
    ("ended", "message"),
    [
        (Ended(1, "error: the disk is full"), "exit code 1 instead of 2"),
        (Ended(2, "Traceback\nerror: the disk"), "there is a stack trace"),
        (Ended(2, "error: one\nerror: two"), "2 lines of error instead of one"),
        (Ended(2, "error: something else"), "'disk' is not in the error"),
    ],
)
def test_what_is_not_the_one_right_message_is_a_failure(ended, message):
    with pytest.raises(AssertionError, match=message):
        require_line(ended, 2, "disk")
    assert require_line(Ended(2, "a warning\nerror: disk full"), 2, "disk") == "error: disk full"


def test_a_fault_that_goes_wrong_is_reported_and_the_campaign_goes_on():
    def wrong(case):
        kinds.require(False, "the parameters differ")

    def broken(case):
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


def test_a_killed_preparation_is_gone_on_with(tmp_path):
    sandbox = Sandbox(tmp_path / "home")
    case = Case(sandbox, Outcome([], ""), "one", random.Random(0))
    assert "went on to the same corpus" in kinds.kill_preparation(case)
    Path(sandbox.corpus / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is no prepared corpus"):
        kinds.kill_preparation(case._replace(name="two"))


def test_an_unknown_kind_is_refused(tmp_path):
    words = ["--out", tmp_path, "--only", "earthquake"]
    result = command("benchmarks.faults", *words)
    assert_refused(result, "no kind is called so; SIGKILL at a random moment")
