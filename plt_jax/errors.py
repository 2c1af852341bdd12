"""The errors that users meet: of bad input, and of what failed around the program."""


class InputError(ValueError):
    """Input that cannot work: says what is wrong and what would be right, in one line.

    Commands print it and exit with code 2 (see `cli.py`); Python callers may catch it as a
    ValueError.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names that it quotes may hold breaks


class MissingProcessError(InputError):
    """Of several processes that train together, some did not come to where all must meet."""


class FailedError(RuntimeError):
    """Something outside the program failed, such as a disk: says what and why, in one line.

    Commands print it and exit with code 1.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))
