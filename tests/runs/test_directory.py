"""The run directory: which paths lead to a checkpoint, and what is refused."""

import shutil

import jax
import numpy as np
import pytest

from plt_jax.data.tokenizer import TOKENIZER
from plt_jax.errors import InputError
from plt_jax.runs.directory import open_trained
from plt_jax.runs.names import CHECKPOINTS, CONFIG
from tests.training.runs import STEPS, finished_run, saved_state


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
    assert trained.tokenizer.decode(trained.tokenizer.encode("peace")) == "peace"


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


def test_what_was_trained_with_a_devices_kernel_opens_on_others(finished, copy):
    resolved = copy / "config.yaml"
    text = resolved.read_text(encoding="utf-8")
    kernels = {
        "  attention: auto": "  attention: splash",
        "decode_attention: auto": "decode_attention: mosaic",
    }
    for auto, kernel in kernels.items():
        assert auto in text
        text = text.replace(auto, kernel)
    resolved.write_text(text, encoding="utf-8")
    assert open_trained(copy).config.model == finished.config.model
