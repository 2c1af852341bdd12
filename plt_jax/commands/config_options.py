"""Configurations on the command line: `CONFIG.yaml [--section.field value ...]`."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, get_origin

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from plt_jax.commands.parser import CommandParser
from plt_jax.config import RunConfig
from plt_jax.config.yaml_file import annotation_at
from plt_jax.errors import InputError
from plt_jax.runs.configuration import load_config


class _Overrides(BaseSettings, RunConfig):
    """RunConfig in the form that pydantic-settings derives command-line options from."""


def parse_run_config(parser: CommandParser, arguments: Sequence[str] | None = None) -> RunConfig:
    """Reads `CONFIG.yaml [--section.field value ...]` and returns the validated configuration.

    Raises:
      InputError: an unknown option, an unreadable file, or a refused value.
    """
    parser.add_argument("config", help="YAML file; it holds what differs from the defaults below")
    source = CliSettingsSource(_Overrides, root_parser=parser)
    parsed = parser.parse_args(arguments)
    return load_config(parsed.config, read_source(source, parsed))


def read_source(source: CliSettingsSource, parsed: Namespace) -> dict[str, Any]:
    """The nested values of the options that were given, not validated.

    Args:
      source: made with the parser that has read the command line.

    Raises:
      InputError: the value of a whole section or list is not JSON.
    """
    try:
        read: Any = source(parsed_args=parsed)
        return read()
    except SettingsError as error:
        raise InputError(
            f"{_broken_json(parsed)} is not valid JSON, the form of whole sections and lists; "
            "correct it, or give fields one by one"
        ) from error


def _is_structured(annotation: Any) -> bool:
    return hasattr(annotation, "model_fields") or get_origin(annotation) is tuple


def _broken_json(parsed: Namespace) -> str:
    """The first option of a section or list whose value is not JSON, with that value."""
    for option, value in vars(parsed).items():
        for text in value if isinstance(value, list) else [value]:
            try:
                if _is_structured(annotation_at(option.split("."))):
                    json.loads(text)
            except (KeyError, AttributeError, TypeError):
                break  # it is not an option of the configuration
            except json.JSONDecodeError:
                return f"--{option} {text}"
    return "an option's value"
