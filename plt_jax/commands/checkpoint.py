"""Lists, checks and exports checkpoints: python -m plt_jax.checkpoint {ls,verify,export} RUN.

It runs on the CPU and does not touch accelerators, which may be training.
"""

from __future__ import annotations

import argparse
from typing import Any

from plt_jax.commands.device_options import DeviceOptions, add_dtype
from plt_jax.commands.parser import CommandParser
from plt_jax.errors import EXIT_DONE, EXIT_FAILED


def main() -> int:
    parser = CommandParser(
        prog="python -m plt_jax.checkpoint",
        description="List, check and export a run's checkpoints.",
        epilog="Exit codes: 0 done, 1 damage found, 2 bad input.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_command(
        commands,
        run_ls,
        "list a run's checkpoints: steps, sizes, losses, and why they are kept",
        "List a run's checkpoints. Files are not read, so this finds only missing files and files "
        "of a wrong size.",
    )
    add_command(
        commands,
        run_verify,
        "check files against their checksums",
        "Read all files of a run's checkpoints, or of one checkpoint, and compare them with the "
        "checksums that were taken when they were saved. Each problem is one line; the exit code "
        "is 1 if there are any.",
    )
    export = add_command(
        commands,
        run_export,
        "write a checkpoint's parameters as a new run directory",
        "Write a checkpoint's parameters, without the optimizer's state, into a new run directory, "
        "which eval.py, plt_jax.generate, plt_jax.convert and train.py's start_from take. Several "
        "processes export a model that is larger than a host's memory.",
    )
    export.add_argument("destination", help="run directory to make")
    add_dtype(export, "parameters", "as they are stored")
    devices = DeviceOptions(export)
    export.set_defaults(run=lambda arguments: run_export(arguments, devices))
    arguments = parser.parse_args()
    import jax  # after parsing, so that --help and refusals are quick

    jax.config.update("jax_platforms", "cpu")
    return arguments.run(arguments)


def add_command(commands: Any, run: Any, summary: str, description: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        run.__name__.removeprefix("run_"), help=summary, description=description
    )
    command.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    command.set_defaults(run=run)
    return command


def run_ls(arguments: argparse.Namespace) -> int:
    from plt_jax.reports.checkpoints import list_checkpoints

    print(list_checkpoints(arguments.path))
    return EXIT_DONE


def run_verify(arguments: argparse.Namespace) -> int:
    from plt_jax.reports.checkpoints import verify_checkpoints

    sound = True
    for report in verify_checkpoints(arguments.path):
        print("\n".join(report.lines()), flush=True)
        sound = sound and not report.damage
    return EXIT_DONE if sound else EXIT_FAILED


def run_export(arguments: argparse.Namespace, devices: DeviceOptions) -> int:
    from plt_jax.distributed import processes
    from plt_jax.runs.export import export_params

    mesh = devices.connect(arguments)
    written = export_params(arguments.path, arguments.destination, arguments.dtype, mesh)
    if processes.is_first():
        print(written)
    devices.finish("the parameters are written")
    return EXIT_DONE
