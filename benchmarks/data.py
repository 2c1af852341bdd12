"""How fast training data is read and prepared, compared with what a chip consumes.

python -m benchmarks.data CORPUS [--inputs FILE ...] [--out FOLDER]

It reads batches of a tokenized corpus as training does, in shuffled order, in one thread and
without reading ahead. With --inputs it also prepares those files, in one process and with the
corpus's tokenizer. Speeds are tokens per second of one core's time. A chip's consumption is that of
training --config at 50 % MFU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.rounds import interleave, positive_integers, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import RunConfig
from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import write_corpus
from plt_jax.data.pipeline import Source, training_dataset
from plt_jax.data.streams import DocumentStream, TokenStream
from plt_jax.data.tokenized_corpus import CorpusManifest, TokenizedCorpus, open_tokenized_corpus
from plt_jax.data.tokens import TokenizedDocuments
from plt_jax.distributed.chips import CHIPS
from plt_jax.errors import InputError
from plt_jax.files.writing import write_text
from plt_jax.model.costs import flops_by_loop
from plt_jax.reports.tables import table_of
from plt_jax.runs.configuration import load_config

MFU = 0.5
COLUMNS = (
    ("tokens_per_second", "tokens/s of a core", "{:,.0f}"),
    ("tokens_per_second_min", "least", "{:,.0f}"),
    ("tokens_per_second_max", "most", "{:,.0f}"),
)


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("corpus", help="folder that plt_jax.data.prepare made")
    parser.add_argument("--inputs", nargs="*", default=[], help="files and folders to prepare")
    parser.add_argument(
        "--text_field", default=CorpusOptions().text_field, help="text field of those files"
    )
    parser.add_argument(
        "--lengths", type=positive_integers, default=[256, 2048, 4096], help="tokens of an example"
    )
    parser.add_argument("--batch", type=int, default=32, help="examples per batch")
    parser.add_argument("--batches", type=int, default=20, help="batches read in one measurement")
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured")
    parser.add_argument(
        "--config", default="configs/plt_dense_1b.yaml", help="configuration that a chip trains"
    )
    parser.add_argument("--out", help="folder for data.json and data.txt")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.batches, arguments.rounds) < 1:
        raise InputError("--batch, --batches and --rounds must be at least 1")
    config = load_config(arguments.config)
    corpus = open_tokenized_corpus(arguments.corpus)
    readers = {
        f"{name}, examples of {length}": reader(stream, length, arguments)
        for length in arguments.lengths
        for name, stream in (("shards", corpus.stream("training")), ("array", as_array(corpus)))
    }
    seconds = interleave(readers, arguments.rounds)
    if arguments.inputs:
        make = preparer(arguments.inputs, arguments.text_field, corpus)
        seconds["prepare"] = [make() for _ in range(min(arguments.rounds, 3))]
    rows = [
        {"label": label, **spread("tokens_per_second", [1 / each for each in found])}
        for label, found in seconds.items()
    ]
    consumed = tokens_consumed(config)
    text = "\n".join(
        [
            table_of(COLUMNS, rows),
            "",
            f"tokens/s that a chip trains of {arguments.config} at {MFU:.0%} MFU, examples of "
            f"{config.sequence_length}:",
            *(f"  {name}: {tokens:,.0f}" for name, tokens in consumed.items()),
        ]
    )
    print(text)
    if arguments.out:
        found = {"command": command_of("benchmarks.data"), "rows": rows, "consumed": consumed}
        write_figures(Path(arguments.out) / "data", found, text)


def command_of(module: str) -> str:
    return " ".join([f"python -m {module}", *sys.argv[1:]])


def write_figures(path: Path, found: Mapping[str, object], text: str) -> None:
    """Writes PATH.json, to which the machine is added, and PATH.txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = json.dumps({**found, "machine": machine()}, indent=1)
    write_text(path.with_suffix(".json"), figures + "\n")
    write_text(path.with_suffix(".txt"), text + "\n")


def as_array(corpus: TokenizedCorpus) -> TokenStream:
    """The corpus's training tokens in memory, as text at hand is kept: the baseline."""
    stream = corpus.stream("training")
    tokens, documents = stream.read(0, len(stream))
    return DocumentStream(
        TokenizedDocuments(tokens, np.flatnonzero(np.diff(documents, prepend=-1)))
    )


def reader(stream: TokenStream, length: int, arguments) -> Callable[[], float]:
    """A timer that reads some batches, and returns seconds of a core per token."""
    config = RunConfig.model_validate(
        {
            "model": {"max_length": length},
            "data": {"prefetch": 0},
            "training": {"batch_size": arguments.batch},
        }
    )
    batches = iter(training_dataset(config, [Source("the corpus", stream)]))
    next(batches)

    def seconds_per_token() -> float:
        start = time.process_time()
        for _ in range(arguments.batches):
            next(batches)
        return (time.process_time() - start) / (arguments.batches * arguments.batch * length)

    return seconds_per_token


def preparer(inputs: list[str], text_field: str, corpus: TokenizedCorpus) -> Callable[[], float]:
    """A timer that prepares the inputs in this process, and returns seconds of a core per token."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def seconds_per_token() -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            manifest = write_corpus(
                inputs,
                Path(folder),
                corpus.tokenizer,
                CorpusOptions(text_field=text_field),
                1,
                lambda *_: lambda *_: None,
            )
            seconds = time.process_time() - start
        assert isinstance(manifest, CorpusManifest)
        return seconds / sum(shard.tokens for shard in manifest.shards)

    return seconds_per_token


def tokens_consumed(config: RunConfig) -> dict[str, float]:
    """Tokens per second that each kind of chip trains at 50 % MFU."""
    loops = flops_by_loop(config.model, config.sequence_length)
    flops = 3 * sum(loop.total for loop in loops)
    return {name: MFU * chip.flops / flops for name, chip in CHIPS.items()}


if __name__ == "__main__":
    run_command(main)
