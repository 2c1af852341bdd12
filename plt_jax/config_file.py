"""Configurations as YAML files: read with overrides, written, their errors told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from plt_jax.config import RunConfig
from plt_jax.errors import InputError, naming
from plt_jax.run_files import CHECKPOINTS, CONFIG, TOKENIZER, list_steps, locate


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Reads a YAML file, lays nested `overrides` over it, and validates the whole once.

    With a `start_from`, that run's model, tokenizer and sequence length lie underneath; once the
    run has saved a checkpoint of its own, its own do.

    Raises:
      InputError: the file cannot be read, is not a YAML mapping, or a value is refused; the message
        names the field, the value and what would be right.
    """
    path = Path(path)
    values = merge(_read_yaml(path), overrides or {})
    if values.get("run_dir") is None:
        values["run_dir"] = str(Path("runs") / path.stem)
    if not isinstance(values.get("start_from"), str):
        return _validate(path, values)
    inherited = _inherited(values["start_from"], Path(str(values["run_dir"])))
    config = _validate(path, merge(inherited, values))
    if inherited["model"]["loop"]["scheme"] == "no_loop" != config.model.loop.scheme:
        raise InputError(
            f"start_from {config.start_from} is a model without loops; give it loops with "
            "python -m plt_jax.convert retrofit, and start from that"
        )
    return config


def load_resolved(path: Path) -> RunConfig:
    """Reads what `dump_config` wrote: nothing is missing, so nothing is looked up elsewhere.

    Raises:
      InputError: as `load_config`.
    """
    return _validate(path, _read_yaml(path))


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every field written out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise InputError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    return values


def _validate(path: Path, values: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {describe_errors(error)}") from error


def _inherited(start_from: str, run_dir: Path) -> dict[str, Any]:
    """What a run takes over from the one that it starts from, or from itself when it resumes."""
    resumes = list_steps(run_dir / CHECKPOINTS)
    with naming("start_from"):
        directory = run_dir.absolute() if resumes else locate(start_from).directory
    config = load_resolved(directory / CONFIG)
    inherited = {
        "model": config.model.model_dump(),
        "data": {"sequence_length": config.sequence_length},
    }
    if (directory / TOKENIZER).exists():
        inherited["tokenizer"] = {"path": str(directory / TOKENIZER)}
    return inherited


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with `top` laid over `base`."""
    merged = dict(base)
    for key, value in top.items():
        under = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        merged[key] = merge(under, value) if both else value
    return merged


def describe_errors(error: pydantic.ValidationError) -> str:
    """Pydantic's errors in one line: field, value, what would be right, nearest name for a typo."""
    return "; ".join(_describe(entry) for entry in error.errors(include_url=False))


def _describe(entry: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        known = _known_fields(entry["loc"][:-1])
        near = difflib.get_close_matches(str(entry["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
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
