"""The benchmark of saving: its figures hang together, and what it refuses."""

import json
import os

import numpy as np
import pytest

from benchmarks import saving
from plt_jax.errors import InputError
from tests.training.runs import tiny_values, write_config


@pytest.fixture
def config(tmp_path):
    return str(write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path)))


@pytest.mark.slow(reason="writes and reads whole checkpoints")
def test_what_writes_and_reads_stands_beside_the_disk(config, tmp_path, capsys):
    out, folder = tmp_path / "saving.json", tmp_path / "disk"
    folder.mkdir()
    saving.main([config, "--rounds", "2", "--folder", str(folder), "--out", str(out)])
    report = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in report["rows"]}
    for label, row in rows.items():
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        if label != "save, until steps go on":
            speed = report["state_bytes"] / row["seconds"] / 1e9
            assert row["gb_per_second"] == pytest.approx(speed)
    whole, blocked = rows["save, until complete"], rows["save, until steps go on"]
    assert blocked["seconds_min"] < whole["seconds_max"]
    disk = rows["disk written"]["seconds"]
    assert whole["of_disk"] == pytest.approx(disk / whole["seconds"])
    both = zip(report["steps_with_a_save"], report["steps_without"], strict=True)
    cost = report["save_costs"]["seconds"]
    assert cost == pytest.approx(np.median([one - other for one, other in both]))
    step = np.median(report["steps_without"]) / report["steps_a_round"]
    assert report["step_seconds"] == pytest.approx(step)
    interval = report["checkpoint_every"] * report["step_seconds"]
    assert report["share_of_step_time"] == pytest.approx(cost / interval)
    assert report["checkpoint_every"] == 4 and report["steps_a_round"] >= 1
    assert not os.listdir(folder)
    assert "of step time with one every 4 steps" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="--rounds is 0"):
        saving.main([config, "--rounds", "0"])
    with pytest.raises(InputError, match=r"--folder .*nowhere does not exist"):
        saving.main([config, "--folder", str(tmp_path / "nowhere")])
