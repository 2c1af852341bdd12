"""Command lines: overrides parsed against the configuration, and the exit codes of all commands.

Exit codes: 0 done, 2 bad input, 1 anything else, 3 stopped by a signal with its state saved.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_origin

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from plt_jax import processes
from plt_jax.config import RunConfig
from plt_jax.config_file import annotation_at, load_config
from plt_jax.errors import FailedError, InputError, MissingProcessError

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose refusals are one line that names the nearest known option."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **settings)

    def error(self, message: str):
        options = [option for action in self._actions for option in action.option_strings]
        unknown = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see --help for the known ones"
            message = f"unknown option {name}; {hint}"
        raise InputError(message)


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
            f"{_broken_json(words)} is not valid JSON, which whole sections and lists are given "
            "as; correct it, or give fields one by one"
        ) from error
    return load_config(parser.parse_args(words).config, overrides)


def _is_structured(annotation: Any) -> bool:
    return hasattr(annotation, "model_fields") or get_origin(annotation) is tuple


def _broken_json(words: Sequence[str]) -> str:
    """The first option, with its value, of a section or list that is no JSON."""
    pairs = [word.split("=", 1) for word in words if "=" in word]
    pairs += itertools.pairwise(words)
    for option, value in pairs:
        try:
            declared = annotation_at(option.removeprefix("--").split("."))
            if option.startswith("--") and _is_structured(declared):
                json.loads(value)
        except (KeyError, AttributeError):
            continue  # no option
        except json.JSONDecodeError:
            return f"{option} {value}"
    return "an option's value"


def _reader_gone() -> bool:
    """Whether whoever read the output, such as `head`, has ended."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail() -> NoReturn:
    if not processes.alone():
        os._exit(EXIT_FAILED)  # the others end too, and JAX would wait for them
    sys.exit(EXIT_FAILED)


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main function and exits; bad input becomes one line and exit code 2,
    and what failed around the program one line and exit code 1. Output that nobody reads any more
    ends it silently, with exit code 1."""
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, MissingProcessError):
            os._exit(EXIT_BAD_INPUT)  # JAX would wait for that process at an ordinary exit, too
        sys.exit(EXIT_BAD_INPUT)
    except FailedError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _fail()
    except BrokenPipeError:
        if not _reader_gone():
            raise
        # Python flushes once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail()
    sys.exit(EXIT_DONE if code is None else code)
