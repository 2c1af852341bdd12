"""Compiles a step for TPU slices or for a GPU, on a machine without either.

python -m plt_jax.compile CONFIG --topology v5p:4x4x8 [--section.field value ...]
python -m plt_jax.compile CONFIG --topology h100 --decode --batch 1,16 --schemes no_loop,plt

For TPUs it needs the package libtpu, and prints the memory that the compiler allots, the program's
collectives, and bounds of the step's time. For GPUs it needs JAX's CUDA plugin, and prints the
program's kernels, what they read and write, and bounds of the step's time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser
from plt_jax.compile.shapes import DecodeShape
from plt_jax.config import RunConfig
from plt_jax.config.variants import variants_of
from plt_jax.decoding.options import WEIGHTS
from plt_jax.distributed.chips import CHIPS, parse_topology
from plt_jax.distributed.gpus import GPUS, names_gpus, parse_gpus
from plt_jax.errors import InputError
from plt_jax.files.writing import write_text

DESCRIPTION = """\
Compile a configuration's train step, or its decode step, for devices that are not here. For TPU
slices (needs the package libtpu): memory, collectives and FLOPs on each device, and bounds of the
step's time. For GPUs (needs JAX's CUDA plugin): kernels by layer, kind and source line, what they
read and write, memory, and bounds of the step's time."""


def main(words: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m plt_jax.compile", description=DESCRIPTION)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE|CARD",
        help=f"a TPU slice, such as v5e:16x16 or v5p:4x4x8 (chips: {', '.join(CHIPS)}); or a GPU, "
        f"such as h100, or h100:8 for eight of a host (cards: {', '.join(GPUS)})",
    )
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices")
    parser.add_argument(
        "--decode", action="store_true", help="compile the decode step instead of the train step"
    )
    parser.add_argument(
        "--batch", help="batch size of the decode step; for GPUs several, such as 1,16"
    )
    parser.add_argument(
        "--context", type=int, help="positions of the decode step's cache (with --decode)"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="dtype of the decode step's large weights; default the compute dtype",
    )
    parser.add_argument(
        "--schemes", help="for GPUs: schemes to compile side by side, such as no_loop,plt"
    )
    parser.add_argument("--loops", help="for GPUs: numbers of loops of those schemes, such as 2,3")
    parser.add_argument(
        "--compare_remat",
        action="store_true",
        help="compile the train step once for each value of model.remat, and compare them",
    )
    parser.add_argument("--json", metavar="FILE", help="JSON file for all that was found")
    words = list(sys.argv[1:] if words is None else words)
    config = parse_run_config(parser, words)
    arguments = parser.parse_args(words)
    if arguments.compare_remat and arguments.decode:
        raise InputError("--compare_remat is for the train step; leave out --decode")
    decode = decode_shapes(arguments, config)
    compile_for = _compile_for_gpu if names_gpus(arguments.topology) else _compile_for_tpu
    text, found = compile_for(arguments, config, decode)
    print(text)
    if arguments.json:
        made = {"config": config.model_dump(mode="json"), **found}
        write_text(Path(arguments.json), json.dumps(made, indent=2) + "\n")


def _compile_for_tpu(
    arguments: argparse.Namespace, config: RunConfig, decode: list[DecodeShape]
) -> tuple[str, dict]:
    topology = parse_topology(arguments.topology, arguments.slices)
    for name in ("schemes", "loops"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} is an option of GPUs; use --model.loop.* for TPUs")
    if len(decode) > 1:
        raise InputError("--batch takes one size for TPUs, and several for GPUs")

    from plt_jax.compile.command import compile_config
    from plt_jax.compile.remat import compare_policies, report_policies
    from plt_jax.compile.report import report

    if arguments.compare_remat:
        estimates = compare_policies(config, topology)
        found = {remat: estimate.as_json() for remat, estimate in estimates.items()}
        return report_policies(estimates), {"by_remat": found}
    shape = decode[0] if decode else None
    estimate = compile_config(config, topology, shape)
    return report(config, estimate), {"decode": shape, **estimate.as_json()}


def _compile_for_gpu(
    arguments: argparse.Namespace, config: RunConfig, decode: list[DecodeShape]
) -> tuple[str, dict]:
    topology = parse_gpus(arguments.topology)
    if arguments.slices != 1:
        raise InputError("--slices is an option of TPUs")
    loop = config.model.loop
    schemes = arguments.schemes.split(",") if arguments.schemes else [loop.scheme]
    loops = whole_numbers("loops", arguments.loops or str(loop.count))
    configs = {
        variant.label: variant.apply_to_run(config) for variant in variants_of(schemes, loops)
    }

    from plt_jax.compile.estimate import package_version
    from plt_jax.compile.gpu_programs import compile_for_gpu, report
    from plt_jax.compile.remat import with_every_policy

    if arguments.compare_remat:
        configs = {
            f"{label}, {remat}": one
            for label, config in configs.items()
            for remat, one in with_every_policy(config).items()
        }
    programs = compile_for_gpu(configs, topology, decode)
    found = {
        "topology": arguments.topology,
        "programs": [program.as_json() for program in programs],
        "versions": {
            name: package_version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin")
        },
    }
    return report(topology, programs), found


def decode_shapes(arguments: argparse.Namespace, config: RunConfig) -> list[DecodeShape]:
    """The decode steps that --batch, --context and --weights ask for; none without --decode.

    Raises:
      InputError: they are given without --decode, or are below 1.
    """
    for name in ("batch", "context", "weights"):
        if getattr(arguments, name) is not None and not arguments.decode:
            raise InputError(f"--{name} is an option of decoding; add --decode, or leave it out")
    if not arguments.decode:
        return []
    context = config.model.max_length if arguments.context is None else arguments.context
    if context < 1:
        raise InputError(f"--context is {context}; it must be at least 1")
    batches = whole_numbers("batch", arguments.batch or "1")
    return [DecodeShape(batch, context, arguments.weights) for batch in batches]


def whole_numbers(name: str, text: str) -> list[int]:
    """The numbers of an option such as 1,16.

    Raises:
      InputError: one is no whole number, or is below 1.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--{name} is {text}; it takes whole numbers, such as 1,16") from None
    if min(numbers) < 1:
        raise InputError(f"--{name} is {text}; it must be at least 1")
    return numbers
