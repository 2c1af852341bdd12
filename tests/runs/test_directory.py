"""The run directory: what may be opened, resumed and overwritten."""

import shutil
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from plt_jax.config import MoEConfig
from plt_jax.errors import InputError
from plt_jax.runs.directory import check_directory, may_change, open_trained
from plt_jax.runs.names import CHECKPOINTS, CONFIG, TOKENIZER
from tests.training.runs import STEPS, assert_refused, command, finished_run, saved_state, snapshot


@pytest.fixture
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run's directory, to damage."""
    finished.copy(tmp_path / "copy")
    return tmp_path / "copy"


def equal(one, other) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_run_is_opened_at_its_newest_checkpoint(finished):
    expected = saved_state(finished.config).params
    for path in (finished.directory, finished.directory / CHECKPOINTS, str(finished.directory)):
        trained = open_trained(path)
        assert trained.step == STEPS
        assert trained.directory == finished.directory
        assert trained.config == finished.config
        assert equal(trained.params, expected)
    assert trained.tokenizer.decode(trained.tokenizer.encode("peace").ids) == "peace"


def test_one_checkpoint_is_opened_by_its_folder(finished):
    older = open_trained(finished.directory / CHECKPOINTS / "4")
    assert older.step == 4
    assert older.directory == finished.directory
    newer = open_trained(finished.directory / CHECKPOINTS / str(STEPS))
    assert not equal(older.params, newer.params)


@pytest.mark.parametrize(
    ("folder", "path"), [(".", "."), ("checkpoints", "."), ("checkpoints", "4"), ("..", "finished")]
)
def test_paths_are_relative_to_the_working_directory(finished, monkeypatch, folder, path):
    monkeypatch.chdir(finished.directory / folder)
    trained = open_trained(path)
    assert trained.step == (4 if path == "4" else STEPS)


def refuses(path, *parts):
    with pytest.raises(InputError) as refusal:
        open_trained(path)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_what_is_no_run_is_refused(copy, tmp_path):
    refuses(tmp_path / "none", "none does not exist", "give a run directory, or one of its")
    refuses(tmp_path, "neither a run directory nor a checkpoint", "config.yaml is missing")
    refuses(copy / CONFIG, "neither a run directory nor a checkpoint")
    refuses(copy / CHECKPOINTS / "3", "3 does not exist")


def test_a_run_without_a_checkpoint_is_refused(copy):
    (copy / CHECKPOINTS / "3").mkdir()
    refuses(copy / CHECKPOINTS / "3", str(copy / CHECKPOINTS / "3"))
    shutil.rmtree(copy / CHECKPOINTS)
    refuses(copy, "checkpoints holds no checkpoint; train until the first is saved")
    (copy / CHECKPOINTS).mkdir()
    refuses(copy, "checkpoints holds no checkpoint")
    refuses(copy / CHECKPOINTS, "checkpoints holds no checkpoint")


def test_a_damaged_checkpoint_is_refused(copy):
    shutil.rmtree(copy / CHECKPOINTS / str(STEPS) / "params")
    checkpoints = copy / CHECKPOINTS
    damaged = f"the checkpoint {checkpoints / str(STEPS)} is damaged: params/"
    refuses(copy, damaged, f"give the one before it, {checkpoints / '4'}")
    assert open_trained(checkpoints / "4").step == 4
    shutil.rmtree(checkpoints / "4" / "params")
    refuses(checkpoints / "4", "the checkpoint", "4 is damaged: params/")


def test_a_damaged_run_is_refused(copy):
    tokenizer = (copy / TOKENIZER).read_bytes()
    (copy / TOKENIZER).unlink()
    refuses(copy, f"cannot read the tokenizer {copy / TOKENIZER} (No such file or directory)")
    (copy / TOKENIZER).write_text("{")
    refuses(copy, f"{copy / TOKENIZER} is not a tokenizer.json")
    (copy / TOKENIZER).write_bytes(tokenizer)
    (copy / CONFIG).write_text("training: {stps: 3}")
    refuses(copy, f"{copy / CONFIG}: unknown field training.stps; did you mean steps?")
    (copy / CONFIG).write_text("a: [")
    refuses(copy, f"{copy / CONFIG} is not valid YAML")
    (copy / CONFIG).unlink()
    refuses(copy, "config.yaml is missing")


def test_a_checkpoint_of_another_model_is_refused(copy):
    text = (copy / CONFIG).read_text().replace("width: 8\n", "width: 16\n", 1)
    (copy / CONFIG).write_text(text)
    refuses(copy, "cannot read the checkpoint", "shape")


def at(config, directory, **sections):
    """The config with another directory and fields of sections changed."""
    changed = {"run_dir": str(directory)}
    for name, values in sections.items():
        section = getattr(config, name)
        changed[name] = section.model_copy(update=values) if isinstance(values, dict) else values
    return config.model_copy(update=changed)


def test_a_new_or_empty_directory_may_be_used_and_is_not_made(finished, tmp_path):
    assert check_directory(at(finished.config, tmp_path / "a" / "b")) == []
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    assert check_directory(at(finished.config, tmp_path / "empty")) == []
    assert not list((tmp_path / "empty").iterdir())


def test_files_and_foreign_directories_are_refused(finished, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"--run_dir .*file is a file; choose another"):
        check_directory(at(finished.config, tmp_path / "file"))
    with pytest.raises(InputError, match=r"--run_dir .* is not empty and holds no config.yaml"):
        check_directory(at(finished.config, tmp_path))
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_a_directory_below_a_file_is_refused(finished, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = command("train.py", finished.directory / CONFIG, "--run_dir", tmp_path / "file" / "a")
    assert_refused(result, "run_dir", str(tmp_path / "file" / "a"))


def test_a_directory_that_cannot_be_written_is_refused(finished, tmp_path):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    words = ["train.py", finished.directory / CONFIG, "--run_dir", tmp_path / "new"]
    with mock.patch.object(Path, "replace", fail):
        assert_refused(command(*words), f"cannot write {tmp_path / 'new' / CONFIG}: No space left")
    (tmp_path / "new").rmdir()
    with mock.patch.object(Path, "mkdir", fail):
        assert_refused(command(*words), "No space left on device")


def test_the_same_config_resumes_without_changes(finished):
    assert check_directory(finished.config) == []


def test_changes_that_no_step_depends_on_are_allowed_and_reported(finished, copy):
    config = at(
        finished.config,
        copy,
        training={"steps": 9, "log_every": 3, "evaluate_every": 5, "checkpoint_every": 6}
        | {"sample_prompt": "peace", "accumulate": 2},
        checkpoint={"keep": 5, "keep_best": 0},
        evaluation={"batch_size": 2, "sequences": None},
        mesh={"fsdp": 2},
        model={"attention": "xla", "remat": "full", "layer_unroll": 2},
        data={"cache_dir": "elsewhere", "prefetch": 0},
    )
    changes = check_directory(config)
    assert f"training.steps: {STEPS} -> 9" in changes
    assert "training.sample_prompt:  -> peace" in changes
    assert f"run_dir: {finished.directory} -> {copy}" in changes
    assert {change.split(":")[0] for change in changes} == {
        *["run_dir", "training.steps", "training.log_every", "training.evaluate_every"],
        *["training.checkpoint_every", "training.sample_prompt", "checkpoint.keep"],
        *["checkpoint.keep_best", "evaluation.batch_size", "evaluation.sequences", "mesh.fsdp"],
        *["data.cache_dir", "data.prefetch", "model.attention"],
        *["model.remat", "model.layer_unroll", "training.accumulate"],
    }


def test_micro_batches_that_the_routers_losses_depend_on_stay(finished):
    def of(**moe):
        model = finished.config.model.model_copy(update={"moe": MoEConfig(experts=4, **moe)})
        return may_change(finished.config.model_copy(update={"model": model}))

    assert "training.accumulate" not in of(load_balance_loss=0.01)
    assert "training.accumulate" not in of(load_balance_loss=0.0, router_z_loss=0.001)
    assert "training.accumulate" in of(load_balance_loss=0.0)


def test_what_was_trained_with_a_devices_kernel_opens_on_others(finished, copy):
    resolved = copy / "config.yaml"
    text = resolved.read_text(encoding="utf-8")
    assert "attention: auto" in text
    resolved.write_text(text.replace("attention: auto", "attention: splash"), encoding="utf-8")
    assert open_trained(copy).config.model == finished.config.model


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"training": {"batch_size": 8}}, "training.batch_size: 4 -> 8"),
        ({"training": {"z_loss": 0.1}}, "training.z_loss: 0.0 -> 0.1"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate: 0.01 -> 0.5"),
        ({"optimizer": {"clip_norm": None}}, "optimizer.clip_norm: 1.0 -> None"),
        ({"data": {"source": "sotu"}}, "data.source: "),
        ({"data": {"sequence_length": 8}}, "data.sequence_length: None -> 8"),
        ({"data": {"validation_source": "x"}}, "data.validation_source: None -> x"),
        ({"tokenizer": {"min_frequency": 3}}, "tokenizer.min_frequency: 2 -> 3"),
        ({"model": {"layers": 3}}, "model.layers: 2 -> 3"),
    ],
)
def test_changes_that_matter_are_refused_with_both_values(finished, copy, sections, expected):
    before = snapshot(copy)
    sections = sections | {"checkpoint": {"keep": 7}}
    with pytest.raises(InputError) as refusal:
        check_directory(at(finished.config, copy, **sections))
    message = str(refusal.value)
    assert f"--run_dir {copy} was made with another config ({expected}" in message
    assert "choose another, or give the same values to resume it" in message
    assert "checkpoint.keep" not in message
    assert snapshot(copy) == before


def test_all_refused_changes_are_listed(finished, copy):
    loop = finished.config.model.loop.model_copy(update={"count": 3})
    with pytest.raises(InputError, match=r"\(seed: 0 -> 2; model\.loop\.count: 2 -> 3\)"):
        check_directory(at(finished.config, copy, seed=2, model={"loop": loop}))
