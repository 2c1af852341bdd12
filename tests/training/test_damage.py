"""Damaged checkpoints: refused by name, skipped by choice, never half used."""

import shutil
from pathlib import Path

import pytest

from plt_jax.checkpoint import store
from plt_jax.checkpoint.manifest import find_damage
from plt_jax.checkpoint.steps import list_steps
from plt_jax.config import CheckpointConfig
from plt_jax.errors import InputError
from plt_jax.runs.metrics_file import read_metrics
from plt_jax.runs.names import CHECKPOINTS, CONFIG
from plt_jax.training import trainer
from tests.checkpoint.damage import data_file, flip_bit, forget_checksums
from tests.training.runs import (
    STEPS,
    assert_refused,
    assert_same_run,
    command,
    losses,
    numbers,
    snapshot,
    tiny_config,
)

pytestmark = pytest.mark.slow(reason="trains several runs")

SKIP = CheckpointConfig(skip_damaged=True)


@pytest.fixture
def run(finished, tmp_path):
    """The config of a copy of the finished run, whose newest checkpoint is damaged."""
    config = finished.copy(tmp_path / "run")
    flip_bit(data_file(tmp_path / "run" / CHECKPOINTS / str(STEPS), "optimizer"))
    return config


def skipping(config):
    return config.model_copy(update={"checkpoint": SKIP})


def test_a_damaged_newest_checkpoint_is_refused_and_nothing_is_changed(run, tmp_path):
    before = snapshot(tmp_path)
    result = command("train.py", tmp_path / "run" / CONFIG, "--run_dir", tmp_path / "run")
    newest = tmp_path / "run" / CHECKPOINTS / str(STEPS)
    assert_refused(result, f"the checkpoint {newest} is damaged: optimizer/", "another checksum")
    assert_refused(result, "--checkpoint.skip_damaged true goes on from one before it (4)")
    assert snapshot(tmp_path) == before


def test_it_is_skipped_by_choice_and_its_steps_are_trained_again(finished, run, tmp_path, capsys):
    damaged = snapshot(tmp_path / "run" / CHECKPOINTS / str(STEPS))
    assert trainer.train(skipping(run)) == trainer.Outcome(STEPS, stopped=False)
    folder = tmp_path / "run" / CHECKPOINTS
    out = capsys.readouterr().out
    assert f"skipping: the checkpoint {folder / str(STEPS)} is damaged: optimizer/" in out
    assert f"moved aside: {folder / f'{STEPS}.damaged'}; delete it" in out
    assert f"resuming at step 4 of {STEPS}" in out
    assert snapshot(folder / f"{STEPS}.damaged") == damaged
    assert list_steps(folder) == [4, STEPS]
    assert find_damage(folder / str(STEPS)) == []
    # Parameters, optimizer, data and metrics, each step once.
    assert_same_run(run, finished.config)


def test_every_damaged_one_is_skipped(finished, tmp_path):
    config = tiny_config(
        finished.home, tmp_path / "run", training={"checkpoint_every": 2}, checkpoint={"keep": 9}
    )
    trainer.train(config)
    folder = tmp_path / "run" / CHECKPOINTS
    (folder / "8" / "manifest.json").unlink()
    data_file(folder / "6").write_bytes(b"")
    flip_bit(data_file(folder / "2"))  # older than the one that is used
    (folder / "6.damaged").mkdir()  # of an earlier time
    assert trainer.train(skipping(config)).step == STEPS
    assert sorted(path.name for path in folder.iterdir() if not path.name.isdigit()) == [
        *["6.damaged", "6.damaged-2", "8.damaged"]
    ]
    assert list_steps(folder)[-1] == STEPS
    assert_same_run(config, finished.config)


def test_with_none_left_the_run_is_refused(run, tmp_path):
    folder = tmp_path / "run" / CHECKPOINTS
    shutil.rmtree(folder / "4" / "params")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="are damaged; begin again in another --run_dir"):
        trainer.train(skipping(run))
    shutil.rmtree(folder / "4")
    before.clear()
    before |= snapshot(tmp_path)
    with pytest.raises(InputError, match="there is none before it; begin again in another"):
        trainer.train(run)
    assert snapshot(tmp_path) == before


def test_skipping_where_nothing_is_damaged_changes_nothing(finished, tmp_path):
    config = finished.copy(tmp_path / "run")
    before = snapshot(tmp_path / "run" / CHECKPOINTS)
    assert trainer.train(skipping(config)).step == STEPS
    assert snapshot(tmp_path / "run" / CHECKPOINTS) == before


def test_what_is_not_to_be_verified_is_read_as_it_is(run, tmp_path):
    file = data_file(tmp_path / "run" / CHECKPOINTS / str(STEPS), "optimizer")
    flip_bit(file)  # back again, so that it can be read; the manifest says otherwise
    flip_bit(tmp_path / "run" / CHECKPOINTS / str(STEPS) / "commit_success.txt")
    unverified = run.model_copy(update={"checkpoint": CheckpointConfig(verify=False)})
    assert trainer.train(unverified).step == STEPS
    with pytest.raises(InputError, match=r"commit_success\.txt has another checksum"):
        trainer.train(run)
    with pytest.raises(ValueError, match="skip_damaged needs verify"):
        CheckpointConfig(verify=False, skip_damaged=True)


def test_what_earlier_versions_saved_is_resumed_with_a_line_that_says_so(
    finished, tmp_path, capsys
):
    config = finished.copy(tmp_path / "run")
    folder = tmp_path / "run" / CHECKPOINTS
    shutil.rmtree(folder / str(STEPS))
    forget_checksums(folder / "4")
    assert trainer.train(config).step == STEPS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the checkpoint {folder / '4'} has no checksums")
    assert losses(config) == losses(finished.config)


def test_damage_that_nobody_verified_is_one_line_too(finished, tmp_path):
    finished.copy(tmp_path / "run")
    newest = tmp_path / "run" / CHECKPOINTS / str(STEPS)
    forget_checksums(newest)
    data_file(newest, "optimizer").unlink()
    result = command("train.py", tmp_path / "run" / CONFIG, "--run_dir", tmp_path / "run")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"error: cannot read the checkpoint {newest}: ")
    assert "Traceback" not in result.err


@pytest.mark.parametrize("name", ["eval.py", "plt_jax.generate"])
def test_damaged_parameters_are_neither_evaluated_nor_sampled(finished, tmp_path, name):
    finished.copy(tmp_path / "run")
    folder = tmp_path / "run" / CHECKPOINTS
    flip_bit(data_file(folder / str(STEPS)))
    result = command(name, tmp_path / "run")
    assert_refused(result, f"the checkpoint {folder / str(STEPS)} is damaged: params/")
    assert_refused(result, f"give the one before it, {folder / '4'}")
    assert command(name, folder / "4").code == 0


def test_a_run_does_not_start_from_damaged_parameters(finished, tmp_path):
    source = finished.copy(tmp_path / "source")
    flip_bit(data_file(tmp_path / "source" / CHECKPOINTS / str(STEPS)))
    config = tiny_config(
        finished.home,
        tmp_path / "run",
        start_from=source.run_dir,
        tokenizer={"path": str(tmp_path / "source" / "tokenizer.json")},
    )
    with pytest.raises(InputError, match="8 is damaged: params/"):
        trainer.train(config)
    assert not (tmp_path / "run").exists()


def test_the_last_good_checkpoint_survives_a_save_that_fails(finished, tmp_path, monkeypatch):
    write = store.write_manifest

    def fail_at_last(path: Path, *others):
        if path.name.startswith(str(STEPS)):
            raise OSError(28, "No space left on device")
        write(path, *others)

    monkeypatch.setattr(store, "write_manifest", fail_at_last)
    config = tiny_config(finished.home, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text((finished.directory / CONFIG).read_text())
    result = command("train.py", path, "--run_dir", config.run_dir)
    folder = tmp_path / "run" / CHECKPOINTS
    assert result.code == 1
    assert result.err == (
        f"error: cannot save the checkpoint {folder / str(STEPS)}: No space left on device; the "
        "last complete one is of step 4\n"
    )
    monkeypatch.undo()
    assert list_steps(folder) == [4]
    trainer.train(config)
    assert numbers(config) == numbers(finished.config)
    assert len(read_metrics(tmp_path / "run")) == STEPS + 2
