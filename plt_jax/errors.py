"""The errors that users meet, and the exit codes of all commands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3
"""0: done. 1: failed for any reason that 2 does not cover. 2: bad input. 3: stopped by a signal,
with the state saved."""


class InputError(ValueError):
    """Input that cannot work: says what is wrong and what would be right, in one line.

    Commands print it and exit with code 2; Python callers may catch it as a ValueError.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names that it quotes may hold breaks


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Puts the configuration's field in front of the refusals of a block that does not know it.

    Raises:
      InputError: the block's, as `field: message`.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from error


class MissingProcessError(InputError):
    """Of several processes that train together, some did not come to where all must meet."""


class FailedError(RuntimeError):
    """Something outside the program failed, such as a disk: says what and why, in one line.

    Commands print it and exit with code 1.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))
