"""metrics.jsonl, TensorBoard events, and the picture of the losses."""

import json
import subprocess
import sys
import threading
import time

import pytest

from plt_jax.reports.loss_plot import plot_losses
from plt_jax.runs.metrics_file import read_metrics, without_times
from plt_jax.training.metrics import MetricsWriter
from plt_jax.training.trackers import TensorBoard
from tests.disks import small_disk
from tests.training.runs import environment, json_rows


@pytest.fixture
def write(tmp_path):
    """Writes rows in one start of a run that resumes at a step."""

    def write(resumed_step, *steps, loss=0.5):
        events = TensorBoard(tmp_path, resumed_step)
        with MetricsWriter(tmp_path, resumed_step, [events]) as metrics:
            for step in steps:
                metrics.write(step, loss=loss, tokens_per_second=7.0)

    return write


def steps(directory) -> list[int]:
    return [row["step"] for row in read_metrics(directory)]


def test_rows_are_json_objects_one_a_line(tmp_path, write):
    began = time.time()
    write(0, 1, 2)
    rows = json_rows(tmp_path / "metrics.jsonl")
    for row in rows:
        assert began - 1 <= row.pop("time") <= time.time() + 1
    assert rows == [
        {"step": 1, "loss": 0.5, "tokens_per_second": 7.0},
        {"step": 2, "loss": 0.5, "tokens_per_second": 7.0},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


class Drawn:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.scalars, self.ended = {}, []

    def draw(self, step, scalars):
        self.scalars |= {(name, step): value for name, value in scalars.items()}

    def rewind(self, step):
        self.ended.append(f"back to {step}")

    def close(self, failed):
        self.ended.append("failed" if failed else "closed")


def test_values_by_loop_and_layer_are_scalars_of_their_own(tmp_path):
    load, drawn = [[0.5, 0.25], [1.0, 2.0]], Drawn()
    with MetricsWriter(tmp_path, 0, [drawn], {"load": (1, 4), "gate": (2, 1)}) as metrics:
        metrics.write(1, loss=4.0, load=load, gate=[[0.75]], norm=[3.0, 5.0])
    assert drawn.scalars == {
        ("loss", 1): 4.0,
        ("load/loop_1/layer_4", 1): 0.5,
        ("load/loop_1/layer_5", 1): 0.25,
        ("load/loop_2/layer_4", 1): 1.0,
        ("load/loop_2/layer_5", 1): 2.0,
        ("gate/loop_2/layer_1", 1): 0.75,
        ("norm/loop_1", 1): 3.0,
        ("norm/loop_2", 1): 5.0,
    }
    (row,) = read_metrics(tmp_path)
    del row["time"]
    assert row == {"step": 1, "loss": 4.0, "load": load, "gate": [[0.75]], "norm": [3.0, 5.0]}


def test_trackers_go_back_and_learn_how_a_run_ends(tmp_path):
    drawn, other = Drawn(), Drawn()
    with MetricsWriter(tmp_path, 0, [drawn]) as metrics:
        metrics.rewind(3)
    assert drawn.ended == ["back to 3", "closed"]
    with pytest.raises(OSError, match="gone"), MetricsWriter(tmp_path, 0, [other]):
        raise OSError("gone")
    assert other.ended == ["failed"]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    drawn = Drawn()
    with MetricsWriter(tmp_path, 0, [drawn]) as metrics:
        metrics.write(1, loss=float("nan"), load=[[0.5, float("inf")]])
        metrics.write(2, loss=2.0)
    assert drawn.scalars == {("load/loop_1/layer_1", 1): 0.5, ("loss", 2): 2.0}
    assert [without_times(row) for row in json_rows(tmp_path / "metrics.jsonl")] == [
        {"step": 1, "loss": None, "load": [[0.5, None]]},
        {"step": 2, "loss": 2.0},
    ]
    plot_losses(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_going_back_drops_what_came_after(tmp_path):
    with MetricsWriter(tmp_path, 0) as metrics:
        for step in range(1, 6):
            metrics.write(step, loss=1.0 * step)
        metrics.rewind(3)
        assert steps(tmp_path) == [1, 2, 3]
        metrics.write(4, loss=9.0)
        assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 9.0]


def test_rows_are_there_at_once(tmp_path):
    with MetricsWriter(tmp_path, 0) as metrics:
        metrics.write(1, loss=2.0)
        assert steps(tmp_path) == [1]


def test_rows_behind_the_resumed_step_are_dropped(tmp_path, write):
    write(0, 1, 2, 3, 3, 4)
    write(3, 4, 5, loss=0.25)
    assert steps(tmp_path) == [1, 2, 3, 3, 4, 5]
    assert [row["loss"] for row in read_metrics(tmp_path)][-3:] == [0.5, 0.25, 0.25]
    write(0, 1)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_a_last_line_that_was_cut_short_is_dropped(tmp_path, write, cut):
    write(0, 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    # Less its newline alone, the row is whole.
    kept = [1, 2, 3] if cut == 1 else [1, 2]
    assert steps(tmp_path) == kept
    write(3, 4)
    assert steps(tmp_path) == [*kept, 4]
    assert [row["step"] for row in json_rows(path)] == [*kept, 4]


def test_there_may_be_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
    MetricsWriter(tmp_path, 0).__exit__(None, None, None)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "validation_loss": 2.0, "bits_per_byte": 1.0}],
        [{"step": 1, "validation_loss": None, "bits_per_byte": None}],
        [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 2.0, "bits_per_byte": 1.0}],
    ],
)
def test_any_rows_make_a_picture(tmp_path, rows, recwarn):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not [str(warning.message) for warning in recwarn if "legend" in str(warning.message)]


FILLED = """
import sys, time
from pathlib import Path
from plt_jax.errors import FailedError
from plt_jax.training.metrics import MetricsWriter
from plt_jax.training.trackers import TensorBoard

directory = Path(sys.argv[1])
with MetricsWriter(directory, 0, [TensorBoard(directory, 0)]) as metrics:
    metrics.write(1, loss=2.0)
    try:
        with (directory / "fill").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
    except OSError:
        pass
    try:
        for step in range(2, 100_000):
            metrics.write(step, loss=2.0)
    except FailedError as error:
        print(error)
"""


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_a_full_disk_ends_the_writing_and_does_not_hang(disk):
    """What tensorboardX writes to is a queue, which nobody empties once its thread has died."""
    done = subprocess.run(
        [sys.executable, "-c", FILLED, disk], env=environment(), capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[-1] == f"cannot write {disk / 'metrics.jsonl'}: No space left on device"


def test_events_that_cannot_be_written_do_not_end_training(tmp_path, monkeypatch, capsys):
    """As a clock that is set back has it: tensorboardX's thread dies of what it cannot write."""
    board = TensorBoard(tmp_path, 0)
    board.draw(1, {"loss": 1.0})
    worker = board._writer.file_writer.event_writer._worker
    monkeypatch.setattr(worker._record_writer, "write_event", lambda event: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    board.draw(2, {"loss": 2.0})
    worker.join(10)
    assert not worker.is_alive()
    for step in (3, 4):
        board.draw(step, {"loss": 3.0})
    board.close(failed=False)
    err = capsys.readouterr().err
    assert err.count("note: ") == 1 and "step 3 begins a new file" in err
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
