"""Turns text, JSON lines or Parquet into shards of tokens to train on (data.sources).

python -m plt_jax.data.prepare INPUT [INPUT ...] --out FOLDER (--tokenizer FILE | --vocab_size V)

Inputs are files or folders: .txt (a document each), .jsonl, .ndjson or .json (a document a line)
and .parquet (a document a row); the first two also compressed as .gz or .zst. Killed at any moment,
the same command goes on where it was. `python -m plt_jax.data.verify FOLDER` checks what it wrote.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer

from plt_jax.commands.parser import CommandParser
from plt_jax.data.corpus_reader import TOKENIZER, Manifest
from plt_jax.data.corpus_writer import Advance, Done, Options, Unit, prepare, split_of
from plt_jax.data.documents import find_files, read_piece, split_files
from plt_jax.data.tokenizer import load_tokenizer, train_tokenizer
from plt_jax.errors import EXIT_STOPPED, InputError
from plt_jax.files import expand

SAMPLE_BYTES = 64 * 2**20
"""Of UTF-8 text, drawn from all files, that a tokenizer is trained on."""
SAMPLE_PIECE_BYTES = 2**20
"""Of one piece of a file in that sample."""
MIN_FREQUENCY = 2


def main() -> int | None:
    parser = CommandParser(prog="python -m plt_jax.data.prepare", description=__doc__)
    defaults = Options()
    parser.add_argument("inputs", nargs="+", help="files and folders of text")
    parser.add_argument("--out", required=True, help="folder of the corpus, made if need be")
    parser.add_argument("--tokenizer", help="a tokenizer.json (Hugging Face tokenizers)")
    parser.add_argument(
        "--vocab_size", type=int, help="train a byte-level BPE tokenizer of this size instead"
    )
    parser.add_argument(
        "--text_field", default=defaults.text_field, help="name of the text in JSON and Parquet"
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=defaults.validation_fraction,
        help="share of the documents held out",
    )
    parser.add_argument(
        "--shard_mib",
        type=int,
        default=defaults.shard_bytes // 2**20,
        help="text that a shard is made from, about; compressed files are not split",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--skip_broken",
        action="store_true",
        help="leave out documents that cannot be read instead of stopping",
    )
    arguments = parser.parse_args()
    if not 0 <= arguments.validation_fraction < 1:
        raise InputError("--validation_fraction must be at least 0 and below 1")
    for name in ("shard_mib", "workers"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    out = expand(arguments.out)
    options = Options(
        arguments.text_field,
        arguments.validation_fraction,
        arguments.shard_mib * 2**20,
        arguments.skip_broken,
        arguments.vocab_size,
    )
    tokenizer = choose_tokenizer(arguments.inputs, out, arguments, options)
    try:
        with Report() as report:
            manifest = prepare(
                arguments.inputs, out, tokenizer, options, arguments.workers, report.begin
            )
    except KeyboardInterrupt:
        print("stopped; run the same command to go on", flush=True)
        return EXIT_STOPPED
    describe(out, manifest)
    return None


def choose_tokenizer(inputs, out: Path, arguments, options: Options) -> Tokenizer:
    """The one that is named, that an earlier call trained, or one trained now.

    Raises:
      InputError: none is named or two are, the file is no tokenizer, or the text cannot be read.
    """
    if (arguments.tokenizer is None) == (arguments.vocab_size is None):
        raise InputError("give one of --tokenizer FILE and --vocab_size V")
    if arguments.tokenizer is not None:
        return load_tokenizer(arguments.tokenizer)
    if (out / TOKENIZER).exists():
        return load_tokenizer(out / TOKENIZER)
    print(f"training a tokenizer of {arguments.vocab_size} tokens ...", flush=True)
    return train_tokenizer(sample(inputs, options), arguments.vocab_size, MIN_FREQUENCY)


def sample(inputs, options: Options) -> Iterator[str]:
    """Documents from the beginnings of pieces spread over all files, SAMPLE_BYTES in all."""
    pieces = split_files(find_files(inputs), options.shard_bytes)
    step = max(len(pieces) * SAMPLE_PIECE_BYTES // SAMPLE_BYTES, 1)
    for piece in pieces[::step]:
        left = max(SAMPLE_BYTES // len(pieces[::step]), SAMPLE_PIECE_BYTES)
        for text in read_piece(piece, options.text_field, lambda problem: None):
            # The vocabulary must not know what is held out.
            if split_of(text.encode("utf-8"), options.validation_fraction) != "training":
                continue
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


class Report:
    """Tells how far the work has come: a bar in a terminal, else a line now and then."""

    SECONDS = 30
    """Between lines."""

    def __init__(self):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._tokens, self._finished = 0, 0
        self._said = self._began = time.monotonic()

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def begin(self, units: int, size: int) -> Advance:
        """See `corpus_writer.prepare`."""
        task = self._bar.add_task("preparing", total=size, tokens=0)

        def advance(unit: Unit, done: Done) -> None:
            self._finished += 1
            self._tokens += sum(shard.tokens for shard in done.shards)
            self._bar.update(task, advance=unit.size, tokens=self._tokens)
            now = time.monotonic()
            if self._bar.disable and now - self._said > self.SECONDS:
                self._said = now
                print(f"{self._finished} of {units} units, {self._tokens:,} tokens", flush=True)

        return advance


def describe(out: Path, manifest: Manifest) -> None:
    """Prints what a corpus holds."""
    for split in ("training", "validation"):
        print(
            f"{split}: {manifest.total(split, 'documents'):,} documents, "
            f"{manifest.total(split, 'tokens'):,} tokens, "
            f"{manifest.total(split, 'text_bytes'):,} bytes of text"
        )
    for count, why in (
        (manifest.empty_documents, "empty"),
        (manifest.broken_documents, "could not be read"),
    ):
        if count:
            print(f"left out: {count:,} documents that were {why}")
    print(f'the corpus is in {out}; train on it with --data.sources \'[{{"path": "{out}"}}]\'')
