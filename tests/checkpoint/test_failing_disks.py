"""Saves that fail or are cut off: said in one line, and the last good checkpoint is still there."""

import errno
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax.checkpoint import store
from plt_jax.checkpoint.manifest import find_damage
from plt_jax.checkpoint.params import load_params
from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import Checkpoints, save_params
from plt_jax.config import CheckpointConfig
from plt_jax.errors import FailedError
from plt_jax.files import folders
from tests.checkpoint.damage import save_steps
from tests.disks import read_only, small_disk

LARGE = {"x": jnp.asarray(np.random.default_rng(0).random(1 << 19), jnp.float32)}
"""Two megabytes that do not compress."""


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte with a checkpoint of step 1."""
    with small_disk(tmp_path / "disk") as folder:
        save_steps(folder, 1)
        yield folder


def assert_first_is_sound(directory):
    assert list_steps(directory) == [1]
    assert find_damage(directory / "1") == []
    abstract = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert np.array_equal(load_params(directory, 1, abstract)["x"], [1, 1, 1])


def save(checkpoints, step, params=LARGE):
    checkpoints.save(step, params, {"y": jnp.ones(2)}, {"next_index": step})


def test_a_full_disk_is_named_at_the_next_save(disk):
    with Checkpoints(disk, CheckpointConfig()) as checkpoints:
        save(checkpoints, 2)
        with pytest.raises(FailedError) as failed:
            save(checkpoints, 3, {"x": jnp.ones(3)})
    assert str(failed.value) == (
        f"cannot save the checkpoint {disk / '2'}: No space left on device; the last complete one "
        "is of step 1"
    )
    assert_first_is_sound(disk)


def test_a_full_disk_is_named_at_the_end_and_can_be_used_again(disk, capfd):
    with (
        pytest.raises(FailedError, match="No space left on device"),
        Checkpoints(disk, CheckpointConfig()) as checkpoints,
    ):
        save(checkpoints, 2)
    assert "Traceback" not in capfd.readouterr().err
    assert_first_is_sound(disk)
    with Checkpoints(disk, CheckpointConfig()) as checkpoints:
        assert sorted(path.name for path in disk.iterdir()) == ["1"]
        save(checkpoints, 2, {"x": jnp.ones(3)})
    assert list_steps(disk) == [1, 2]


def test_a_folder_that_has_become_read_only_is_named(disk):
    with (
        Checkpoints(disk, CheckpointConfig()) as checkpoints,
        read_only(disk),
        pytest.raises(FailedError, match="2: Read-only file system; the last complete one is of"),
    ):
        save(checkpoints, 2, {"x": jnp.ones(3)})
    assert_first_is_sound(disk)


def test_converted_parameters_that_do_not_fit_are_refused_by_their_reason(disk):
    with pytest.raises(OSError, match=r"^No space left on device$"):
        save_params(disk, 2, LARGE)


@pytest.mark.parametrize(
    ("function", "owner"),
    [("take_checksums", store), ("write_manifest", store), ("rename", Path)],
)
@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "Disk quota exceeded"), MemoryError()])
def test_a_save_that_ends_at_any_point_leaves_the_last_one(
    tmp_path, monkeypatch, function, owner, error
):
    """Whatever ends it: afterwards there is what there is after a kill."""
    save_steps(tmp_path, 1)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(owner, function, fail)
    expected = FailedError if isinstance(error, OSError) else MemoryError
    with pytest.raises(expected) as failed, Checkpoints(tmp_path, CheckpointConfig()) as saved:
        save(saved, 2, {"x": jnp.ones(3)})
    if expected is FailedError:
        assert f"{tmp_path / '2'}: Disk quota exceeded; the last complete" in str(failed.value)
    monkeypatch.undo()
    assert_first_is_sound(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    save_steps(tmp_path, 2, config=CheckpointConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_what_cannot_be_removed_is_named_and_the_new_one_is_there(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    save_steps(tmp_path, 1)
    monkeypatch.setattr(folders.shutil, "rmtree", fail)
    with pytest.raises(FailedError) as failed:
        save_steps(tmp_path, 2, config=CheckpointConfig(keep=1, keep_best=0))
    message = f"cannot remove the checkpoint {tmp_path / '1'}: Operation not permitted"
    assert str(failed.value) == message
    assert list_steps(tmp_path) == [2]
    assert find_damage(tmp_path / "2") == []


def test_a_folder_that_another_machine_has_renamed_and_this_one_does_not_see(tmp_path, monkeypatch):
    """Else what this process wrote would have no checksums."""
    listed = []
    monkeypatch.setattr(Path, "is_dir", lambda path: path.name != "2.unfinished")
    monkeypatch.setattr(store, "own_files", listed.append)
    with (
        pytest.raises(FailedError, match=r"2\.unfinished does not appear on this machine"),
        Checkpoints(tmp_path, CheckpointConfig(), patience=0) as checkpoints,
    ):
        save(checkpoints, 2, {"x": jnp.ones(3)})
    assert listed == []


def test_only_leftovers_are_removed(tmp_path):
    save_steps(tmp_path, 1)
    kept = ["1", "2.damaged", "notes", "best.unfinished", "3.txt"]
    left = [
        "2.unfinished",
        "2.unfinished.orbax-checkpoint-tmp",
        "2.orbax-checkpoint-tmp",
        "4.deleted",
    ]
    for name in {*kept, *left} - {"1"}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with Checkpoints(tmp_path, CheckpointConfig()):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(store, "take_checksums", fail)

    def run():
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            save(checkpoints, 1, {"x": jnp.ones(3)})
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        run()
    error = capsys.readouterr().err
    assert error == f"error: cannot save the checkpoint {tmp_path / '1'}: Disk quota exceeded; " + (
        "there is none yet\n"
    )
