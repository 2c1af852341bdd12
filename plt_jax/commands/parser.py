"""The argument parser of all commands, and how commands end.

Commands import JAX only after they have parsed their arguments, so that `--help` and refusals of
options answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from plt_jax.commands.background_traces import divert_background_traces
from plt_jax.config.renamed import present_name
from plt_jax.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    FailedError,
    InputError,
    one_line,
)

TRACEBACK = "PLT_TRACEBACK"
"""The environment variable with which commands show the tracebacks of unforeseen errors."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # An option without a value is off by default.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """The argument parser of all commands.

    Options are spelled with underscores. Hyphens in their place are read as underscores, so that
    `--batch-size` is `--batch_size`. A refusal is one line, which names the nearest known option.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **settings)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(self._with_underscores, words)), namespace)

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            name = unknown[0].split("=")[0]
            known, spelled = self._known(), with_underscores(name)
            near = difflib.get_close_matches(spelled, known, n=1, cutoff=0.5)
            renamed = f"--{present_name(spelled.removeprefix('--'))}"
            meant = renamed if renamed in known else next(iter(near), None)
            hint = f"did you mean {meant}?" if meant else "see --help for the known ones"
            message = f"unknown option {name}; {hint}"
        raise InputError(message)

    def _with_underscores(self, word: str) -> str:
        """A word of the command line, in which a known option has underscores."""
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        if name in known or with_underscores(name) not in known:
            return word
        return with_underscores(name) + equals + value

    def _known(self) -> list[str]:
        """The options of this parser and of its sub-commands."""
        known = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    known += command._option_string_actions
        return known


def integers(text: str) -> list[int]:
    """Parses an option's value: whole numbers that are separated by commas; none if it is empty.

    Raises:
      argparse.ArgumentTypeError: a part is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers, as 1,2,3") from error


def with_underscores(option: str) -> str:
    """The spelling of a long option with underscores; other words stay as they are."""
    return "--" + option[2:].replace("-", "_") if option.startswith("--") else option


def _output_is_closed() -> bool:
    """Whether the program that read the output, such as `head`, has ended."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _is_one_of_several() -> bool:
    """Whether other processes work together with this one."""
    if "jax" not in sys.modules:
        return False
    import jax

    # The number of processes alone would make JAX take the devices, only to end.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _end(code: int, reason: str | None = None) -> NoReturn:
    """Ends the command.

    Args:
      reason: why it fails, if other processes may not know by themselves; they end, too.
    """
    if reason is not None and _is_one_of_several():
        from plt_jax.distributed import lifeline, processes

        # What all are given alike, such as an option, each refuses in a line of its own.
        if code == EXIT_BAD_INPUT and processes.all_refuse(lifeline.GRACE_SECONDS):
            sys.exit(code)
        lifeline.leave(reason)
        # At an ordinary exit JAX would wait for the other processes.
        os._exit(code)
    sys.exit(code)


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main function and exits with its code.

    An InputError becomes one line and exit code 2, a FailedError one line and exit code 1. If the
    program that read the output has ended, the command ends silently with exit code 1. Any other
    error becomes one line, too, which says how to see its traceback (TRACEBACK). Stack traces that
    libraries print in the background go to a file, unless TRACEBACK asks for them.
    """
    if not os.environ.get(TRACEBACK):
        divert_background_traces()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what it cannot show otherwise
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _end(EXIT_BAD_INPUT, None if error.in_all_processes else str(error))
    except FailedError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _end(EXIT_FAILED, str(error))
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # of panics in libraries that are not written in Python, too
        _end_unforeseen(error)
    sys.exit(EXIT_DONE if code is None else code)


def _end_unforeseen(error: BaseException) -> NoReturn:
    """Ends the command with an error that it does not foresee."""
    if isinstance(error, BrokenPipeError) and sys.stdout is not None and _output_is_closed():
        _drop_output()
        _end(EXIT_FAILED, "nobody reads its output any more")
    if os.environ.get(TRACEBACK):
        if not _is_one_of_several():
            raise error
        traceback.print_exception(error)
    if _is_one_of_several():
        from plt_jax.distributed import lifeline

        # If the cause is that another process has ended, it says so, and ends this one.
        time.sleep(lifeline.GRACE_SECONDS)
    line = _describe(error)
    print(f"error: {line}", file=sys.stderr, flush=True)
    _drop_output()
    _end(EXIT_FAILED, line)


def _drop_output() -> None:
    """Drops what cannot be written: at exit Python would try again, and fail with a message."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: BaseException) -> str:
    """An error that no command foresees, in one line."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        what = f"{error.strerror}{where}"
    else:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
    return one_line(
        f"{command} failed: {what}; if the cause is not on this machine, report it with the "
        f"traceback that {TRACEBACK}=1 shows"
    )
