"""Configurations as YAML files: reading, validating with one-line errors, and writing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from plt_jax.config import RunConfig
from plt_jax.config.renamed import present_name, with_present_names
from plt_jax.errors import InputError
from plt_jax.files.reading import read_bounded

MOST_BYTES = 2**20
"""Bytes of the largest configuration file."""
LOADER_ERRORS = (ValueError, OverflowError, TypeError, AttributeError, RecursionError)
"""What Python raises for the dates and numbers in a YAML file that it does not have."""
MOST_VALUES = 100_000
"""The most values that one stands for; a real one has some hundreds."""


def load_resolved(path: Path) -> RunConfig:
    """Reads a configuration that `dump_config` of this or an earlier version wrote.

    All its fields are given, so that none is taken over from another run.

    Raises:
      InputError: as `load_config` raises it.
    """
    return validate(path, with_present_names(read_yaml(path)))


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every field written out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file, not validated.

    Raises:
      InputError: the file cannot be read, or does not hold a mapping.
    """
    try:
        values = load_bounded(read_bounded(path, MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"the config {path}: {error}") from error
    except (yaml.YAMLError, *LOADER_ERRORS) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise InputError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    return values


def load_bounded(text: str) -> Any:
    """The value of a YAML text, in which aliases may stand for few values only.

    Raises:
      InputError: the value has more than MOST_VALUES parts. Aliases of aliases would make billions
        of them out of a few hundred bytes.
      Exception: the text is not YAML, or names a value that Python does not have.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_parts(node, {}) > MOST_VALUES:
            raise InputError(f"it stands for more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_parts(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values that a node stands for, aliases followed."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # of a node that holds itself
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count_parts(part, known) for part in parts)
    return known[id(node)]


def validate(path: Path, values: Mapping[str, Any]) -> RunConfig:
    """The configuration of nested values.

    Args:
      path: the file that the values came from, for the message.
      values: the nested values.

    Raises:
      InputError: a value is refused; the message names the field, the value and what would be
        right.
    """
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {describe_errors(error)}") from error


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, in which the values of `top` replace those of `base`."""
    merged = dict(base)
    for key, value in top.items():
        under = merged.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = merge(under, value)
        merged[key] = value
    return merged


def describe_errors(error: pydantic.ValidationError) -> str:
    """Pydantic's errors in one line: the field, the value, what would be right, and the nearest
    known name for a typo."""
    return "; ".join(_describe(entry) for entry in error.errors(include_url=False))


def _describe(entry: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        known = _known_fields(entry["loc"][:-1])
        near = difflib.get_close_matches(str(entry["loc"][-1]), known, n=1, cutoff=0.5)
        meant = present_name(name) or next(iter(near), None)
        hint = f"did you mean {meant}?" if meant else f"known here: {', '.join(known)}"
        return f"unknown field {name}; {hint}"
    if entry["type"] == "missing":
        return f"{name} is missing"
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} = {entry['input']!r}: {message[0].lower()}{message[1:]}"


def _known_fields(location: tuple[str | int, ...]) -> list[str]:
    return list(annotation_at(location).model_fields)


def annotation_at(location: Iterable[str | int]) -> Any:
    """The type that the configuration declares at a place, such as ("model", "width")."""
    annotation: Any = RunConfig
    for part in location:
        if isinstance(part, int):  # an item of a list
            annotation, _ = get_args(annotation)
        else:
            annotation = annotation.model_fields[part].annotation
    return annotation
