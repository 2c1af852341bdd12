"""python -m plt_jax.checkpoint ls, verify and export, as their users call them."""

import jax
import numpy as np
import pytest

from plt_jax.checkpoint.steps import list_steps
from plt_jax.reports import checkpoints as report
from plt_jax.reports.checkpoints import describe_size
from plt_jax.runs.directory import open_trained
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import CHECKPOINTS
from tests.checkpoint.damage import data_file, files_of, flip_bit, forget_checksums
from tests.training.runs import STEPS, assert_refused, command, snapshot

CHECKPOINT = "plt_jax.checkpoint"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run's directory, to damage; it has checkpoints 4 and 8."""
    finished.copy(tmp_path / "run")
    return tmp_path / "run"


def table(result) -> dict[str, str]:
    """Lines of a table by their step."""
    assert result.code == 0, result
    return {line.split()[0]: line for line in result.out.splitlines()[1:]}


def test_ls_lists_what_there_is_and_why(run):
    (run / CHECKPOINTS / "8.damaged").mkdir()
    forget_checksums(run / CHECKPOINTS / "4")
    rows = table(command(CHECKPOINT, "ls", run))
    assert list(rows) == ["4", "8", "not"]
    assert rows["4"].split()[-3:] == ["newest", "no", "checksums"]
    assert rows["8"].split()[-3:] == ["newest,", "best", "complete"]
    losses = [row["validation_loss"] for row in read_metrics(run) if "validation_loss" in row]
    assert f"{losses[-1]:.4f}" in rows["8"]
    assert rows["not"] == f"not a checkpoint: {run / CHECKPOINTS / '8.damaged'}"


def test_ls_sees_missing_files_without_reading(run):
    file = data_file(run / CHECKPOINTS / "8")
    flip_bit(file)
    assert table(command(CHECKPOINT, "ls", run / CHECKPOINTS / "8"))["8"].endswith("complete")
    file.unlink()
    rows = table(command(CHECKPOINT, "ls", run))
    assert "damaged: params/" in rows["8"] and rows["8"].endswith("is missing")
    assert rows["4"].endswith("complete")


def test_verify_says_what_is_sound(run):
    before = snapshot(run)
    result = command(CHECKPOINT, "verify", run)
    assert result.code == 0
    lines = result.out.splitlines()
    count = len(files_of(run / CHECKPOINTS / "4")) - 1
    assert lines[0].startswith(f"{run / CHECKPOINTS / '4'}: sound, {count} files, ")
    assert lines[1].startswith(f"{run / CHECKPOINTS / '8'}: sound, ")
    assert snapshot(run) == before


def test_verify_names_every_problem_and_exits_with_1(run):
    folder = run / CHECKPOINTS
    flip_bit(data_file(folder / "4"))
    data_file(folder / "4", "optimizer").unlink()
    result = command(CHECKPOINT, "verify", run)
    assert result.code == 1
    lines = result.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(folder / "4")] * 2 + [str(folder / "8")]
    assert "optimizer/" in lines[0] and lines[0].endswith("is missing")
    assert "params/" in lines[1] and lines[1].endswith("has another checksum")
    assert command(CHECKPOINT, "verify", folder / "8").code == 0
    assert command(CHECKPOINT, "verify", folder / "4").code == 1


def test_verify_says_what_it_cannot_verify(run):
    forget_checksums(run / CHECKPOINTS / "4")
    result = command(CHECKPOINT, "verify", run / CHECKPOINTS / "4")
    assert result.code == 0
    assert "4: has no checksums (an earlier version saved it), not verified" in result.out


@pytest.mark.parametrize("how", ["ls", "verify"])
def test_a_checkpoint_that_its_run_removes_meanwhile_is_left_out(run, monkeypatch, how):
    find_damage = report.find_damage

    def remove_before(checkpoint, **options):
        if checkpoint.name == "4":
            checkpoint.rename(checkpoint.with_name("4.deleted"))
            if how == "ls":
                raise FileNotFoundError
        return find_damage(checkpoint, **options)

    monkeypatch.setattr(report, "find_damage", remove_before)
    result = command(CHECKPOINT, how, run)
    assert result.code == 0
    assert f"{run / CHECKPOINTS / '8'}: sound" in result.out or "complete" in result.out
    assert "\n   4" not in result.out and f"{CHECKPOINTS}/4:" not in result.out


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_opens_like_its_run(run, tmp_path, dtype):
    words = [] if dtype is None else ["--dtype", dtype]
    result = command(CHECKPOINT, "export", run / CHECKPOINTS / "4", tmp_path / "new", *words)
    assert result.code == 0, result
    assert f"step 4: 5,344 parameters, {dtype or 'float32'}" in result.out
    assert list_steps(tmp_path / "new" / CHECKPOINTS) == [0]
    assert not (tmp_path / "new" / CHECKPOINTS / "0" / "optimizer").exists()
    source, new = open_trained(run / CHECKPOINTS / "4"), open_trained(tmp_path / "new")
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), source.params)
    assert jax.tree.structure(new.params) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert new.config.model == source.config.model
    assert command(CHECKPOINT, "verify", tmp_path / "new").code == 0


def test_an_export_is_evaluated_and_trained_from(run, tmp_path):
    assert command(CHECKPOINT, "export", run, tmp_path / "new").code == 0
    one, other = command("eval.py", run), command("eval.py", tmp_path / "new")
    assert one.code == other.code == 0, other
    assert (
        one.out.split("loop")[-1].split("written")[0]
        == (other.out.split("loop")[-1].split("written")[0])
    )
    words = ["train.py", tmp_path / "new" / "config.yaml", "--run_dir"]
    assert_refused(command(*words, tmp_path / "new"), "holds parameters alone", "--start_from")


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run, tmp_path):
    flip_bit(data_file(run / CHECKPOINTS / str(STEPS)))
    words = [CHECKPOINT, "export", run]
    before = snapshot(tmp_path)
    assert_refused(command(*words, tmp_path / "new"), "8 is damaged: params/", "checkpoints/4")
    assert_refused(command(*words, run), f"{run} is not empty")
    assert_refused(command(*words, tmp_path / "new", "--dtype", "int8"), "invalid choice: 'int8'")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["ls", "verify"])
def test_where_there_is_no_checkpoint_it_is_said(run, tmp_path, name):
    assert_refused(command(CHECKPOINT, name, tmp_path / "none"), "none does not exist")
    assert_refused(command(CHECKPOINT, name, tmp_path), "neither a run directory nor a checkpoint")
    (run / CHECKPOINTS).rename(run / "elsewhere")
    assert_refused(command(CHECKPOINT, name, run), "checkpoints holds no checkpoint")


def test_sizes_are_told_in_units_that_suit_them():
    sizes = [0, 999, 1000, 28_040_000, 999_900_000, 1_000_000_000, 1.234e13]
    assert [describe_size(size) for size in sizes] == [
        *["0 B", "999 B", "1 kB", "28 MB", "1.0 GB", "1.0 GB", "12,340.0 GB"]
    ]
