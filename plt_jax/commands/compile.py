"""Compiles a step for TPU slices, on a machine without a TPU.

python -m plt_jax.compile CONFIG --topology v5p:4x4x8 [--section.field value ...]

It needs the package libtpu. It prints the memory that the compiler allots, the program's
collectives, and bounds of the step's time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser
from plt_jax.config import RunConfig
from plt_jax.distributed.chips import CHIPS, parse_topology
from plt_jax.errors import InputError
from plt_jax.files import write_text

DESCRIPTION = """\
Compile a configuration's train step, or its decode step, for TPU slices, and report its memory,
collectives and FLOPs on each device, and bounds of the step's time. Needs the package libtpu, but
no TPU."""


def main(words: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m plt_jax.compile", description=DESCRIPTION)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help=f"a slice, such as v5e:16x16 or v5p:4x4x8; chips are {', '.join(CHIPS)}",
    )
    parser.add_argument("--slices", type=int, default=1, help="number of such slices")
    parser.add_argument(
        "--decode", action="store_true", help="compile the decode step instead of the train step"
    )
    parser.add_argument("--batch", type=int, help="batch size of the decode step (with --decode)")
    parser.add_argument(
        "--context", type=int, help="positions of the decode step's cache (with --decode)"
    )
    parser.add_argument("--json", metavar="FILE", help="JSON file for the whole estimate")
    words = list(sys.argv[1:] if words is None else words)
    config = parse_run_config(parser, words)
    arguments = parser.parse_args(words)
    topology = parse_topology(arguments.topology, arguments.slices)
    check_decode(arguments, config)

    from plt_jax.compile.command import compile_config
    from plt_jax.compile.report import report

    decode = (arguments.batch, arguments.context) if arguments.decode else None
    estimate = compile_config(config, topology, decode)
    print(report(config, estimate))
    if arguments.json:
        made = {"config": config.model_dump(mode="json"), "decode": decode, **estimate.as_json()}
        write_text(Path(arguments.json), json.dumps(made, indent=2) + "\n")


def check_decode(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Sets the defaults of --batch and --context.

    Raises:
      InputError: they are given without --decode, or are below 1.
    """
    for name, default in (("batch", 1), ("context", config.model.max_length)):
        value = getattr(arguments, name)
        if value is not None and not arguments.decode:
            raise InputError(f"--{name} is an option of decoding; add --decode, or leave it out")
        value = default if value is None else value
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")
        setattr(arguments, name, value)
