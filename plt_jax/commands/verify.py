"""Checks the contents of a tokenized corpus against its manifest.

python -m plt_jax.data.verify FOLDER

Exit code 0: every file is as it was written; 1: files are damaged or missing, each named in a line.
"""

from __future__ import annotations

import sys

from plt_jax.commands.parser import CommandParser
from plt_jax.data.tokenized_corpus import find_problems
from plt_jax.errors import EXIT_DONE, EXIT_FAILED
from plt_jax.files.paths import expand


def main() -> int:
    parser = CommandParser(prog="python -m plt_jax.data.verify", description=__doc__)
    parser.add_argument("folder", help="folder of the corpus")
    folder = expand(parser.parse_args().folder)
    problems = find_problems(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{folder} is as it was written")
    return EXIT_FAILED if problems else EXIT_DONE
