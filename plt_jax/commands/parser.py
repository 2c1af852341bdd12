"""What all commands share: their argument parser, and how they end.

Nothing here imports JAX, so that `--help` and refusals of options answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from plt_jax.config.renamed import present_name
from plt_jax.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    FailedError,
    InputError,
    MissingProcessError,
)


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
            renamed = f"--{present_name(name.removeprefix('--'))}"
            meant = renamed if renamed in options else next(iter(near), None)
            hint = f"did you mean {meant}?" if meant else "see --help for the known ones"
            message = f"unknown option {name}; {hint}"
        raise InputError(message)


def _reader_gone() -> bool:
    """Whether whoever read the output, such as `head`, has ended."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail() -> NoReturn:
    if "jax" in sys.modules:  # else no other process was ever met
        from plt_jax.distributed import processes

        if not processes.is_single():
            os._exit(EXIT_FAILED)  # the other processes end too, and JAX would wait for them
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
