"""Renamed fields: run directories of earlier versions open, a user's old name is refused."""

import pytest
import yaml

from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser
from plt_jax.config import RunConfig
from plt_jax.config.renamed import RENAMED, present_name, with_present_names
from plt_jax.config.yaml_file import annotation_at, dump_config, load_resolved
from plt_jax.errors import InputError
from plt_jax.runs.configuration import load_config


def in_old_names(values: dict) -> dict:
    """What a version before every renaming would have written."""
    for old, new in RENAMED.items():
        (*old_sections, old_name), (*new_sections, new_name) = old.split("."), new.split(".")
        target = origin = values
        for section in new_sections:
            origin = origin[section]
        for section in old_sections:
            target = target.setdefault(section, {})
        target[old_name] = origin.pop(new_name)
    return values


def test_a_resolved_config_of_an_earlier_version_opens_as_its_present_one(tmp_path):
    config = RunConfig.model_validate(
        {"run_dir": "run", "data": {"synthetic": {"task": "addition", "difficulties": [2, 3]}}}
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(in_old_names(yaml.safe_load(dump_config(config)))))
    assert "questions:" in path.read_text() and "synthetic:" not in path.read_text()
    assert load_resolved(path) == config
    path.write_text(dump_config(config))
    assert load_resolved(path) == config


def test_renaming_leaves_its_argument_and_other_fields_alone():
    values = {"seed": 1, "data": {"source": "a", "questions": {"task": "dyck"}}}
    renamed = with_present_names(values)
    assert renamed == {"seed": 1, "data": {"source": "a", "synthetic": {"task": "dyck"}}}
    assert values["data"] == {"source": "a", "questions": {"task": "dyck"}}
    for other in ({}, {"data": None}, {"data": 3}, {"seed": 1}):
        assert with_present_names(other) == other


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_users_old_name_is_refused_with_the_present_one(tmp_path, old, new):
    assert present_name(f"{old}.part") == f"{new}.part"
    assert present_name(f"{old}s") is None
    annotation_at(new.split("."))  # it exists
    values: object = {}
    for name in reversed(old.split(".")):
        values = {name: values}
    path = tmp_path / "name.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=f"unknown field {old}; did you mean {new}\\?"):
        load_config(path)
    path.write_text("{}")
    with pytest.raises(InputError, match=f"unknown option --{old}; did you mean --{new}\\?"):
        parse_run_config(CommandParser(), [str(path), f"--{old}", "{}"])
