"""The errors that users see, and the exit codes of all commands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3
"""0: the command is done. 1: it failed for any reason that 2 does not cover. 2: its input is bad.
3: a signal stopped it, and its state is saved."""


MOST_CHARACTERS = 2000
"""Characters of the longest message; what it quotes may have any length."""


def one_line(message: str) -> str:
    """A message as one line that a terminal can show.

    What it quotes, as names of files and tensors, may hold line breaks, escape sequences, and bytes
    that are no text.
    """
    if len(message) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    line = " ".join(message.splitlines())
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in line
    )


class InputError(ValueError):
    """Input that cannot work. The message says in one line what is wrong and what would be right.

    Commands print it and exit with code 2; Python callers may catch it as a ValueError.
    """

    in_all_processes = False
    """Whether it ends all processes that train together, each with a line of its own."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Puts the name of a configuration field in front of the messages of a block's InputErrors.

    Raises:
      InputError: the block raised one; the message is `field: message`.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from error


class MissingProcessError(InputError):
    """Some of the processes that train together did not reach a point where all must meet."""


class FailedError(RuntimeError):
    """Something outside the program, such as a disk, failed. The message says what and why, in one
    line.

    Commands print it and exit with code 1.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))
