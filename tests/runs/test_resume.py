"""Which run directories training may use, and which changes of a configuration resume a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest

from plt_jax.config import MoEConfig, RunConfig
from plt_jax.config.types import MAY_CHANGE, Section
from plt_jax.config.yaml_file import dump_config
from plt_jax.errors import InputError
from plt_jax.runs.names import CONFIG
from plt_jax.runs.resume import check_directory
from tests.training.runs import STEPS, assert_refused, command, finished_run, snapshot


@pytest.fixture
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run's directory, to change."""
    finished.copy(tmp_path / "copy")
    return tmp_path / "copy"


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
    (tmp_path / "empty" / ".lock").touch()  # of a run on NFS that was killed while it started
    assert check_directory(at(finished.config, tmp_path / "empty")) == []


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


def test_accumulate_may_change_only_without_router_losses(finished, copy):
    def check(**moe):
        run_dir = {"run_dir": str(copy)}
        model = finished.config.model.model_copy(update={"moe": MoEConfig(experts=4, **moe)})
        config = finished.config.model_copy(update={"model": model, **run_dir})
        (copy / CONFIG).write_text(dump_config(config), encoding="utf-8")
        training = config.training.model_copy(update={"accumulate": 2})
        return check_directory(config.model_copy(update={"training": training}))

    for weights in ({"load_balance_loss": 0.01}, {"load_balance_loss": 0.0, "router_z_loss": 0.1}):
        with pytest.raises(InputError, match=r"\(training.accumulate: 1 -> 2\)"):
            check(**weights)
    assert check(load_balance_loss=0.0) == ["training.accumulate: 1 -> 2"]


def test_the_fields_that_may_change_are_decided_on_purpose():
    """A new field may not change, until it is marked as MayChange and named here."""

    def names(section: type[Section], prefix: str = "") -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = [
                one for one in (field.annotation, *get_args(field.annotation)) if is_section(one)
            ]
            if MAY_CHANGE in field.metadata:
                yield prefix + name
            elif inner:
                yield from names(inner[0], f"{prefix}{name}.")

    def is_section(annotation) -> bool:
        return isinstance(annotation, type) and issubclass(annotation, Section)

    assert set(names(RunConfig)) == {
        *["run_dir", "start_from", "mesh", "processes", "checkpoint", "evaluation"],
        *[
            "model.attention",
            "model.decode_attention",
            "model.moe.grouped_product",
            "model.remat",
            "model.layer_unroll",
            "model.loop.exit_threshold",
        ],
        *["data.cache_dir", "data.cache_gb", "data.prefetch", "data.sources.path"],
        *["data.synthetic.test_difficulties", "tokenizer.path"],
        *["training.steps", "training.accumulate", "training.log_every"],
        *["training.evaluate_every", "training.checkpoint_every", "training.hang_after"],
        *["training.sample_prompt", "training.profile_from", "training.profile_steps"],
        *["training.wandb_project", "guard.patience", "guard.rollbacks"],
    }


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
