"""Configurations on the command line: `CONFIG.yaml [--section.field value ...]`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any, get_origin

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from plt_jax.commands.parser import CommandParser, with_underscores
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
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        source = CliSettingsSource(_Overrides, root_parser=parser, cli_parse_args=words)
        overrides = source()
    except SettingsError as error:
        raise InputError(
            f"{_broken_json(words)} is not valid JSON, the form of whole sections and lists; "
            "correct it, or give fields one by one"
        ) from error
    return load_config(parser.parse_args(words).config, overrides)


def _is_structured(annotation: Any) -> bool:
    return hasattr(annotation, "model_fields") or get_origin(annotation) is tuple


def _broken_json(words: Sequence[str]) -> str:
    """The first option of a section or list whose value is not JSON, with that value."""
    joined = (word.partition("=")[::2] for word in words if "=" in word)
    for option, value in itertools.chain(joined, itertools.pairwise(words)):
        option = with_underscores(option)
        try:
            declared = annotation_at(option.removeprefix("--").split("."))
            if option.startswith("--") and _is_structured(declared):
                json.loads(value)
        except (KeyError, AttributeError):
            continue  # it is not an option of the configuration
        except json.JSONDecodeError:
            return f"{option} {value}"
    return "an option's value"
