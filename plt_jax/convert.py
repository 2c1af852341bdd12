"""Converts checkpoints: python -m plt_jax.convert {import,export,retrofit} SRC DST.

A command only; its parts are in plt_jax/interop/. It runs on the CPU and leaves accelerators alone.
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_jax.cli import CommandParser, run_command

if TYPE_CHECKING:
    from plt_jax.run import Model

SAMPLE_LENGTH = 256  # Tokens that a retrofitted model is compared on.


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
    import jax

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
        "--shard_gb", type=float, default=5.0, help="most gigabytes (1e9 bytes) of one file"
    )
    command.set_defaults(run=run_export)


def add_retrofit(commands: Any) -> None:
    from plt_jax.config import SCHEMES

    command = commands.add_parser(
        "retrofit",
        help="a model without loops to the starting point of a looped one",
        description="Give a model without loops the loops of a PLT, as a run directory for "
        "continued training: train.py configs/continue.yaml --start_from DESTINATION. With "
        "--hidden_scale 0 --gate_bias 20 its logits are the source's.",
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
        "the window 2%%, 20 nothing",
    )
    command.add_argument(
        "--embedding_scale", type=float, default=1.0, help="scale on the embeddings, loops > 1"
    )
    command.add_argument(
        "--hidden_scale", type=float, default=0.0, help="scale on the previous loop's output"
    )
    command.add_argument(
        "--normalize_between_loops",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="apply the final norm to what the next loop reads",
    )
    command.set_defaults(run=run_retrofit)


def add_dtype(command: CommandParser, what: str, default: str) -> None:
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help=f"dtype of the {what}; default as {default}",
    )


def run_import(arguments: argparse.Namespace) -> None:
    from rich.progress import track

    from plt_jax.config import DataConfig, EvaluationConfig, RunConfig
    from plt_jax.data.tokenizer import check_size, load_tokenizer
    from plt_jax.files import check_new_folder
    from plt_jax.interop.huggingface import load_params, open_huggingface
    from plt_jax.interop.tokenizer_files import carried_files
    from plt_jax.run import create_run

    check_new_folder(arguments.destination)
    source = open_huggingface(arguments.source, arguments.dtype)
    tokenizer = Path(arguments.tokenizer or source.folder / "tokenizer.json")
    if arguments.tokenizer or tokenizer.exists():
        check_size(load_tokenizer(tokenizer), source.config.vocab_size)
    else:
        print(f"{source.folder} has no tokenizer.json: evaluation and generation need --tokenizer")
        tokenizer = None
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
    create_run(run, params, tokenizer, carried_files(source.folder))
    described = describe(config, params)
    print(f"imported {source.model_type} from {source.folder}: {described}")
    print(f"written to {arguments.destination}")


def run_export(arguments: argparse.Namespace) -> None:
    from plt_jax.data.tokenizer import load_tokenizer
    from plt_jax.errors import InputError
    from plt_jax.files import check_new_folder, new_folder
    from plt_jax.interop.huggingface import check_exportable, write_huggingface
    from plt_jax.interop.model_types import model_type_of
    from plt_jax.interop.tokenizer_files import (
        carried_files,
        carried_token_ids,
        write_tokenizer,
    )
    from plt_jax.run import open_model
    from plt_jax.run_files import HUGGINGFACE, TOKENIZER

    if not 0 < arguments.shard_gb < math.inf:
        raise InputError(f"--shard_gb is {arguments.shard_gb}; it must be above 0, and finite")
    check_new_folder(arguments.destination)
    model = open_model(arguments.source)
    config = model.config.model
    check_exportable(config, model.params)
    carried = carried_files(model.directory / HUGGINGFACE)
    with new_folder(arguments.destination) as folder:
        for file in carried:
            shutil.copyfile(file, folder / file.name)
        if any(file.name == TOKENIZER for file in carried):
            token_ids = carried_token_ids(model.directory / HUGGINGFACE)
        elif (model.directory / TOKENIZER).exists():
            tokenizer = load_tokenizer(model.directory / TOKENIZER)
            token_ids = write_tokenizer(folder, tokenizer, config.max_length)
        else:
            token_ids = carried_token_ids(model.directory / HUGGINGFACE)
        shard_bytes = int(arguments.shard_gb * 1e9)
        write_huggingface(folder, config, model.params, arguments.dtype, shard_bytes, token_ids)
    described = describe(config, model.params)
    print(f"exported {model.directory}, step {model.step}, as {model_type_of(config)}: {described}")
    print(f"written to {arguments.destination}")


def run_retrofit(arguments: argparse.Namespace) -> None:
    import pydantic

    from plt_jax.config import LoopConfig
    from plt_jax.config_file import describe_errors
    from plt_jax.errors import InputError
    from plt_jax.files import check_new_folder
    from plt_jax.interop.retrofit import retrofit
    from plt_jax.interop.tokenizer_files import carried_files
    from plt_jax.run import create_run, open_model
    from plt_jax.run_files import HUGGINGFACE, TOKENIZER

    check_new_folder(arguments.destination)
    try:
        loop = LoopConfig(
            scheme=arguments.scheme,
            count=arguments.loops,
            window=arguments.window,
            gate_input=arguments.gate_input,
            embedding_scale=arguments.embedding_scale,
            hidden_scale=arguments.hidden_scale,
            normalize_between_loops=arguments.normalize_between_loops,
        )
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error)) from error
    model = open_model(arguments.source)
    config, params = retrofit(model.config.model, model.params, loop, arguments.gate_bias)
    update = {"model": config, "run_dir": arguments.destination, "start_from": None}
    tokenizer = model.directory / TOKENIZER
    create_run(
        model.config.model_copy(update=update),
        params,
        tokenizer if tokenizer.exists() else None,
        carried_files(model.directory / HUGGINGFACE),
    )
    print(f"retrofitted {model.directory}, step {model.step}: {describe(config, params)}")
    print_distance(model, config, params)
    print(
        f"written to {arguments.destination}; to train from it: python train.py "
        f"configs/continue.yaml --start_from {arguments.destination}"
    )


def print_distance(model: Model, config: Any, params: Any) -> None:
    """Says where the retrofitted model starts, compared with its source."""
    import jax

    from plt_jax.interop.retrofit import distance

    dense = model.config.model
    length = min(SAMPLE_LENGTH, dense.max_length)
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, dense.vocab_size)
    start = distance(dense, model.params, config, params, tokens)
    print(
        f"on {length} random tokens its logits are within {start.largest:.2g} of the source's, its "
        f"predictions {start.divergence:.2g} nats (KL) away"
    )


def describe(config: Any, params: Any) -> str:
    import jax

    leaves = jax.tree.leaves(params)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    loop = config.loop
    return f"{loop.scheme}, {loop.count} loops, {count:,} parameters, {dtypes}, {size / 1e9:.2f} GB"


if __name__ == "__main__":
    run_command(main)
