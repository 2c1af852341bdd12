"""Converts checkpoints: python -m plt_jax.convert {import,export,retrofit} SRC DST.

A command only; its parts are in plt_jax/interop/. It runs on the CPU and leaves accelerators alone.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import pydantic
from rich.progress import track

from plt_jax.commands.parser import CommandParser
from plt_jax.config import SCHEMES, EvaluationConfig, LoopConfig, ModelConfig, RunConfig
from plt_jax.config.data import DataConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.data.tokenizer import check_size, load_tokenizer
from plt_jax.errors import InputError
from plt_jax.files import check_new_folder, new_folder
from plt_jax.interop.config_json import write_config
from plt_jax.interop.huggingface import (
    DTYPES,
    SHARD_BYTES,
    check_exportable,
    load_params,
    open_huggingface,
    write_huggingface,
)
from plt_jax.interop.model_types import model_type_of
from plt_jax.interop.retrofit import CLOSED, distance, retrofit
from plt_jax.interop.tokenizer_files import carried_files, take_tokenizer
from plt_jax.runs.directory import create_run, find_checkpoint, read_params
from plt_jax.runs.names import HUGGINGFACE, TOKENIZER


def main() -> None:
    parser = CommandParser(
        prog="python -m plt_jax.convert",
        description="Convert checkpoints; a destination is written whole or not at all.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_import(commands)
    add_export(commands)
    add_retrofit(commands)
    arguments = parser.parse_args()

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
    command.add_argument("source", help="folder of the Hugging Face checkpoint")
    command.add_argument("destination", help="run directory to make")
    add_dtype(command, "parameters", "they are stored as")
    command.add_argument("--tokenizer", help="tokenizer.json to use instead of the source's")
    command.set_defaults(run=run_import)


def add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="a run's checkpoint to a Hugging Face one",
        description="Write a run's parameters as a Hugging Face checkpoint: config.json, "
        "safetensors and the tokenizer's files.",
    )
    command.add_argument("source", help="a run directory, or one of its checkpoints/STEP folders")
    command.add_argument("destination", help="folder to make")
    add_dtype(command, "tensors", "the parameters are stored as")
    command.add_argument(
        "--shard_gb", type=float, default=SHARD_BYTES / 1e9, help="most gigabytes of one file"
    )
    command.set_defaults(run=run_export)


def add_retrofit(commands: Any) -> None:
    command = commands.add_parser(
        "retrofit",
        help="a model without loops to the starting point of a looped one",
        description="Give a model without loops the loops of a PLT, as a run directory for "
        "continued training: train.py configs/continue.yaml --start_from DESTINATION. With "
        f"--hidden_scale 0 --gate_bias {CLOSED:g} its logits are the source's.",
    )
    command.add_argument("source", help="a run directory, or one of its checkpoints/STEP folders")
    command.add_argument("destination", help="run directory to make")
    command.add_argument("--loops", type=int, default=2, help="loops L")
    looped = [scheme for scheme in SCHEMES if scheme != "no_loop"]
    command.add_argument("--scheme", choices=looped, default="plt", help="looping scheme")
    command.add_argument("--window", type=int, default=64, help="keys of the windowed branch")
    command.add_argument(
        "--gate_input", choices=("query", "hidden"), default="query", help="what the gate reads"
    )
    command.add_argument(
        "--gate_bias",
        type=float,
        default=0.0,
        help="where the gates start: 0 blends loop 1's attention and the window's evenly, 4 gives "
        f"the window 2%%, {CLOSED:g} nothing",
    )
    command.add_argument(
        "--embedding_scale", type=float, default=1.0, help="scale on the embeddings, loops > 1"
    )
    command.add_argument(
        "--hidden_scale", type=float, default=0.01, help="scale on the previous loop's output"
    )
    command.add_argument(
        "--normalize_between_loops",
        choices=("true", "false"),
        help="apply the final norm to what the next loop reads; default: but for "
        "loop_kv_share_window",
    )
    command.add_argument(
        "--compare_tokens",
        type=int,
        help="random tokens on which to compare it with the source, 0 for none; default 256, or "
        "four windows",
    )
    command.set_defaults(run=run_retrofit)


def add_dtype(command: CommandParser, what: str, default: str) -> None:
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help=f"dtype of the {what}; default as {default}",
    )


def run_import(arguments: argparse.Namespace) -> None:
    check_new_folder(arguments.destination)
    source = open_huggingface(arguments.source, arguments.dtype)
    carried = carried_files(source.folder)
    tokenizer = carried.get(TOKENIZER)
    if arguments.tokenizer:
        # In another's place, what came with that is no longer true; where there was none, it is.
        tokenizer, others = Path(arguments.tokenizer), {} if tokenizer else carried
        carried = others | {TOKENIZER: tokenizer}
    if tokenizer is not None:
        check_size(load_tokenizer(tokenizer), source.config.vocab_size)
    else:
        print(f"{source.folder} has no tokenizer.json: evaluation and generation need --tokenizer")
    bar = functools.partial(
        track, description="reading", transient=True, disable=not sys.stdout.isatty()
    )
    params = load_params(source, track=bar)
    config = source.config
    run = RunConfig(
        run_dir=arguments.destination,
        model=config,
        # What evaluation reads at a time, where the context may be far longer than memory allows.
        data=DataConfig(sequence_length=min(config.max_length, 1024)),
        evaluation=EvaluationConfig(batch_size=8),
    )
    create_run(run, params, tokenizer, carried)
    described = describe(config, params)
    print(f"imported {source.model_type} from {source.folder}: {described}")
    print(f"written to {arguments.destination}")


def run_export(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.shard_gb < math.inf:
        raise InputError(f"--shard_gb is {arguments.shard_gb}; it must be above 0, and finite")
    check_new_folder(arguments.destination)
    found = find_checkpoint(arguments.source)
    config, params = found.config.model, read_params(found)
    check_exportable(config, params)
    with new_folder(arguments.destination) as folder:
        token_ids = take_tokenizer(
            found.directory / TOKENIZER, found.directory / HUGGINGFACE, folder, config.max_length
        )
        shard_bytes = int(arguments.shard_gb * 1e9)
        write_huggingface(folder, config, params, arguments.dtype, shard_bytes, token_ids)
    described = describe(config, params)
    print(f"exported {found.directory}, step {found.step}, as {model_type_of(config)}: {described}")
    print(f"written to {arguments.destination}")


def run_retrofit(arguments: argparse.Namespace) -> None:
    if (arguments.compare_tokens or 0) < 0:
        raise InputError(f"--compare_tokens is {arguments.compare_tokens}; it must be 0 or more")
    check_new_folder(arguments.destination)
    loop = loop_of(arguments)
    found = find_checkpoint(arguments.source)
    source, source_params = found.config.model, read_params(found)
    config, params = retrofit(source, source_params, loop, arguments.gate_bias)
    update = {"model": config, "run_dir": arguments.destination, "start_from": None}
    tokenizer = found.directory / TOKENIZER
    create_run(
        found.config.model_copy(update=update),
        params,
        tokenizer if tokenizer.exists() else None,
        carried_files(found.directory / HUGGINGFACE),
    )
    print(f"retrofitted {found.directory}, step {found.step}: {describe(config, params)}")
    print(f"written to {arguments.destination}")
    try:
        write_config(config, "float32", {})
    except InputError as error:
        print(f"note: {error}")
    advice = ""
    if loop.shifted and loop.hidden_scale == 0:
        print("note: with hidden_scale 0 no loop reads the one before it; change it to train")
        advice = " --model.loop.hidden_scale 0.01"
    print(
        "to train from it: python train.py configs/continue.yaml --start_from "
        f"{arguments.destination}{advice}",
        flush=True,
    )
    if arguments.compare_tokens == 0:
        return
    length = arguments.compare_tokens or max(256, 4 * loop.window)
    length = min(length, config.max_length)
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, config.vocab_size)
    start = distance(source, source_params, config, params, tokens)
    print(
        f"on {length} random tokens its logits are within {start.largest:.2g} of the source's, its "
        f"predictions {start.divergence:.2g} nats (KL) away"
    )
    if loop.later_attention == "gated" and length <= loop.window:
        print(f"note: the window of {loop.window} held all of them, so its effect does not show")


def loop_of(arguments: argparse.Namespace) -> LoopConfig:
    """The looping that a retrofit asks for."""
    # The public type of loop_kv_share_window has no norm between loops.
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
        )
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error)) from error


def describe(config: ModelConfig, params: Any) -> str:
    """A model in one line: how it loops, and how large it is."""
    leaves = jax.tree.leaves(params)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    loop = config.loop
    return f"{loop.scheme}, {loop.count} loops, {count:,} parameters, {dtypes}, {size / 1e9:.2f} GB"
