"""Converts checkpoints: python -m plt_jax.convert {import,export,retrofit,quantize} SOURCE TARGET.

It runs on the CPU and does not touch accelerators, which may be training.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from typing import Any

import pydantic

from plt_jax.commands.device_options import DeviceOptions, add_dtype
from plt_jax.commands.parser import CommandParser
from plt_jax.config import SCHEMES, LoopConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.errors import InputError
from plt_jax.interop.options import CLOSED_GATE_BIAS, SHARD_BYTES


def main() -> None:
    parser = CommandParser(
        prog="python -m plt_jax.convert",
        description="Convert checkpoints; a destination is written whole or not at all. Several "
        "processes, each on a host of its own, convert a model that is larger than a host's "
        "memory.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_import(commands)
    add_export(commands)
    add_retrofit(commands)
    add_quantize(commands)
    arguments = parser.parse_args()
    import jax  # after parsing, so that --help and refusals are quick

    jax.config.update("jax_platforms", "cpu")
    arguments.run(arguments)


def add_import(commands: Any) -> None:
    command = commands.add_parser(
        "import",
        help="a Hugging Face checkpoint to a run directory",
        description="Read a Hugging Face checkpoint (config.json and safetensors) into a run "
        "directory with an orbax checkpoint, which eval.py, plt_jax.generate and train.py's "
        "start_from take.",
    )
    command.add_argument(
        "source",
        help="folder of the Hugging Face checkpoint, or its name on the Hub: ORG/NAME or "
        "ORG/NAME@REVISION",
    )
    command.add_argument("destination", help="run directory to make")
    add_dtype(command, "parameters", "the source's")
    command.add_argument(
        "--tokenizer",
        help="tokenizer.json, or ORG/NAME[@REVISION] on the Hub, to use instead of the source's",
    )
    devices = DeviceOptions(command)
    command.set_defaults(run=lambda arguments: run_import(arguments, devices))


def add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="a run's checkpoint to a Hugging Face one",
        description="Write a run's parameters as a Hugging Face checkpoint: config.json, "
        "safetensors and the tokenizer's files.",
    )
    command.add_argument("source", help="a run directory, or one of its checkpoints/STEP folders")
    command.add_argument("destination", help="folder to make")
    add_dtype(command, "tensors", "the parameters'")
    command.add_argument(
        "--shard_gb", type=float, default=SHARD_BYTES / 1e9, help="size limit of one file, in GB"
    )
    command.add_argument(
        "--push",
        metavar="ORG/NAME[@BRANCH]",
        help="push the folder to this repository on the Hub, too; one that is made is private",
    )
    devices = DeviceOptions(command)
    command.set_defaults(run=lambda arguments: run_export(arguments, devices))


def add_retrofit(commands: Any) -> None:
    command = commands.add_parser(
        "retrofit",
        help="a model without loops to the starting point of a looped one",
        description="Give a model without loops the loops of a PLT, as a run directory for "
        "continued training: train.py configs/continue.yaml --start_from DESTINATION --data.source "
        "FOLDER. With "
        f"--hidden_scale 0 --gate_bias {CLOSED_GATE_BIAS:g} its logits are the source's.",
    )
    command.add_argument("source", help="a run directory, or one of its checkpoints/STEP folders")
    command.add_argument("destination", help="run directory to make")
    command.add_argument("--loops", type=int, default=2, help="number of loops")
    looped = [scheme for scheme in SCHEMES if scheme != "no_loop"]
    command.add_argument("--scheme", choices=looped, default="plt", help="looping scheme")
    command.add_argument(
        "--first_layer", type=int, default=0, help="first layer that loops, counted from 0"
    )
    command.add_argument(
        "--last_layer", type=int, help="last layer that loops, counted from 0; default: the last"
    )
    command.add_argument(
        "--window",
        type=int,
        default=64,
        help="keys that the windowed attention of later loops sees",
    )
    command.add_argument(
        "--gate_input", choices=("query", "hidden"), default="query", help="what the gate reads"
    )
    command.add_argument(
        "--gate_bias",
        type=float,
        default=0.0,
        help="bias of the gates at the start: 0 blends loop 1's attention and the window's evenly, "
        f"4 gives the window 2%%, {CLOSED_GATE_BIAS:g} gives it nothing",
    )
    command.add_argument(
        "--embedding_scale",
        type=float,
        default=1.0,
        help="scale of the embeddings that later loops read",
    )
    command.add_argument(
        "--hidden_scale",
        type=float,
        default=0.01,
        help="scale of the previous loop's output that later loops read",
    )
    command.add_argument(
        "--normalize_between_loops",
        choices=("true", "false"),
        help="apply a norm to each loop's output before the next loop reads it; default: "
        "true, but false for loop_kv_share_window",
    )
    command.add_argument(
        "--compare_tokens",
        type=int,
        help="number of random tokens on which it is compared with the source, 0 for none; "
        "default: 256, or four windows if that is more",
    )
    devices = DeviceOptions(command)
    command.set_defaults(run=lambda arguments: run_retrofit(arguments, devices))


def add_quantize(commands: Any) -> None:
    command = commands.add_parser(
        "quantize",
        help="a run's checkpoint with its large weights rounded to eight bits",
        description="Round the large weights of a run's checkpoint to eight bits, with one scale "
        "for each output of a product, into a new run directory. plt_jax.generate and "
        "plt_jax.serve read it as it is; eval.py measures what the rounding costs. It cannot be "
        "trained further.",
    )
    command.add_argument("source", help="a run directory, or one of its checkpoints/STEP folders")
    command.add_argument("destination", help="run directory to make")
    devices = DeviceOptions(command)
    command.set_defaults(run=lambda arguments: run_quantize(arguments, devices))


def run_import(arguments: argparse.Namespace, devices: DeviceOptions) -> None:
    from rich.progress import track

    from plt_jax.distributed import processes
    from plt_jax.runs.conversion import import_run

    mesh = devices.connect(arguments)
    hidden = not (sys.stdout.isatty() and processes.is_first())
    progress_bar = functools.partial(track, description="reading", transient=True, disable=hidden)
    import_run(
        arguments.source,
        arguments.destination,
        arguments.dtype,
        arguments.tokenizer,
        mesh,
        report=print_first,
        track=progress_bar,
    )
    devices.finish("the run is written")


def run_export(arguments: argparse.Namespace, devices: DeviceOptions) -> None:
    from plt_jax.runs.conversion import export_run

    if not 0 < arguments.shard_gb < math.inf:
        raise InputError(f"--shard_gb is {arguments.shard_gb}; it must be above 0, and finite")
    shard_bytes = int(arguments.shard_gb * 1e9)
    export_run(
        arguments.source,
        arguments.destination,
        arguments.dtype,
        shard_bytes,
        arguments.push,
        devices.connect(arguments),
        report=print_first,
    )
    devices.finish("the checkpoint is written")


def run_retrofit(arguments: argparse.Namespace, devices: DeviceOptions) -> None:
    from plt_jax.runs.conversion import retrofit_run

    loop = read_loop(arguments)
    retrofit_run(
        arguments.source,
        arguments.destination,
        loop,
        arguments.gate_bias,
        arguments.compare_tokens,
        devices.connect(arguments),
        report=print_first,
    )
    devices.finish("the run is written")


def run_quantize(arguments: argparse.Namespace, devices: DeviceOptions) -> None:
    from plt_jax.runs.conversion import quantize_run

    mesh = devices.connect(arguments)
    quantize_run(arguments.source, arguments.destination, mesh, report=print_first)
    devices.finish("the run is written")


def read_loop(arguments: argparse.Namespace) -> LoopConfig:
    """The looping that the arguments of a retrofit describe.

    Raises:
      InputError: a value is out of range.
    """
    # Hugging Face's model type for loop_kv_share_window has no norm between loops.
    by_scheme = "false" if arguments.scheme == "loop_kv_share_window" else "true"
    normalize = (arguments.normalize_between_loops or by_scheme) == "true"
    try:
        return LoopConfig(
            scheme=arguments.scheme,
            count=arguments.loops,
            window=arguments.window,
            gate_input=arguments.gate_input,
            embedding_scale=arguments.embedding_scale,
            hidden_scale=arguments.hidden_scale,
            normalize_between_loops=normalize,
            first_layer=arguments.first_layer,
            last_layer=arguments.last_layer,
        )
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error)) from error


def print_first(line: str) -> None:
    """Prints a line in process 0, at once, because the next one may take minutes."""
    from plt_jax.distributed import processes

    if processes.is_first():
        print(line, flush=True)
