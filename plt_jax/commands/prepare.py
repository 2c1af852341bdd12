"""Tokenizes text, JSON lines or Parquet into shards to train on (data.sources).

python -m plt_jax.data.prepare INPUT [INPUT ...] --out FOLDER (--tokenizer FILE | --vocab_size V)

Inputs are files or folders: .txt (a document each), .jsonl, .ndjson or .json (a document per line)
and .parquet (a document per row); the first two kinds may be compressed as .gz or .zst. Inputs and
FOLDER may be gs://BUCKET/PATH. If it is stopped or killed, the same command goes on. Several
machines write parts of one corpus with --part K --of N. `python -m plt_jax.data.verify FOLDER`
checks the shards that it wrote.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from plt_jax.buckets.address import is_in_bucket
from plt_jax.commands.parser import CommandParser
from plt_jax.data.corpus_units import CorpusOptions, UnitResult, WorkUnit, split_of
from plt_jax.data.corpus_writer import Part, UnitCallback, has_tokenizer, write_corpus
from plt_jax.data.documents import read_piece, split_files
from plt_jax.data.input_files import counted, describe_left_out, find_files
from plt_jax.data.shards import SPLITS
from plt_jax.data.tokenized_corpus import CorpusManifest
from plt_jax.data.tokenizer import TOKENIZER, TextTokenizer, find_tokenizer, load_tokenizer
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.errors import EXIT_STOPPED, InputError
from plt_jax.files.paths import check_reachable, check_writable, expand

SAMPLE_LENGTH = 64 * 2**20
"""Characters of text, from all files together, that a tokenizer is trained on, about."""
PIECE_SAMPLE_LENGTH = 2**20
"""Fewest characters to sample from a piece of a file, if it has as many."""
WAIT_SECONDS, WAIT_LINE_SECONDS = 2, 60
"""Time between two looks for the tokenizer of part 1, and between the lines that say so."""
MIN_FREQUENCY = 2
"""Occurrences that a pair of tokens needs to be merged, when training a tokenizer."""


def main() -> int | None:
    arguments = parse_arguments()
    out = expand(arguments.out)
    options = CorpusOptions(
        arguments.text_field,
        arguments.validation_fraction,
        arguments.shard_mib * 2**20,
        arguments.skip_broken,
        arguments.vocab_size,
    )
    part = Part(arguments.part, arguments.of)
    if is_in_bucket(out):
        check_reachable(out)
        check_writable(out)
    left_out = [
        path
        for path in find_files(arguments.inputs).left_out
        if not path.absolute().is_relative_to(out.absolute())
    ]
    if left_out:
        print(f"note: not all files are read{describe_left_out(left_out)}", flush=True)
    try:
        tokenizer = choose_tokenizer(arguments, out, options, part)
        with ProgressReport() as progress:
            written = write_corpus(
                arguments.inputs, out, tokenizer, options, arguments.workers, progress.start, part
            )
    except KeyboardInterrupt:
        print("stopped; run the same command to go on", flush=True)
        return EXIT_STOPPED
    if isinstance(written, int):
        print(
            f"{part} is written; {counted(written, 'unit')} of other parts "
            f"{'is' if written == 1 else 'are'} missing. The part that ends last completes the "
            "corpus; if the others have ended, run them again."
        )
    else:
        print_summary(out, written)
    return None


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(prog="python -m plt_jax.data.prepare", description=__doc__)
    defaults = CorpusOptions()
    parser.add_argument("inputs", nargs="+", help="files and folders of text")
    parser.add_argument("--out", required=True, help="the corpus's folder, made if need be")
    parser.add_argument(
        "--tokenizer",
        help="a tokenizer.json (Hugging Face tokenizers), or ORG/NAME[@REVISION] on the Hub",
    )
    parser.add_argument(
        "--vocab_size", type=int, help="train a byte-level BPE tokenizer of this size instead"
    )
    parser.add_argument(
        "--text_field", default=defaults.text_field, help="JSON field or Parquet column of the text"
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
        help="MiB of input files that become one shard, about; compressed files are not split",
    )
    parser.add_argument(
        "--part", type=int, default=1, help="which part to write, of --of; each machine another"
    )
    parser.add_argument("--of", type=int, default=1, help="number of parts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes")
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
    if not 1 <= arguments.part <= arguments.of:
        raise InputError(
            f"--part {arguments.part} --of {arguments.of}: the parts are 1 to {arguments.of}"
        )
    return arguments


def choose_tokenizer(
    arguments: argparse.Namespace, out: Path, options: CorpusOptions, part: Part
) -> TextTokenizer:
    """The tokenizer of --tokenizer, the one that an earlier call trained, or a newly trained one.

    The first part trains it; the others wait for it.

    Raises:
      InputError: not exactly one of --tokenizer and --vocab_size is given, the file is not a
        tokenizer, or the text cannot be read.
    """
    if (arguments.tokenizer is None) == (arguments.vocab_size is None):
        raise InputError("give one of --tokenizer FILE and --vocab_size V")
    if arguments.tokenizer is not None:
        return load_tokenizer(find_tokenizer(arguments.tokenizer))
    if part.number > 1:
        wait_for_tokenizer(out, part)
    if (out / TOKENIZER).exists():
        return load_tokenizer(out / TOKENIZER)
    print(f"training a tokenizer of {arguments.vocab_size} tokens ...", flush=True)
    return train_tokenizer(
        sample_documents(arguments.inputs, options), arguments.vocab_size, MIN_FREQUENCY
    )


def wait_for_tokenizer(out: Path, part: Part) -> None:
    """Waits until part 1 has trained the tokenizer of the corpus `out`."""
    said = float("-inf")
    while not has_tokenizer(out):
        if time.monotonic() - said >= WAIT_LINE_SECONDS:
            said = time.monotonic()
            print(
                f"{part} waits for the tokenizer, which part 1 trains: the same command with "
                "--part 1 ...",
                flush=True,
            )
        time.sleep(WAIT_SECONDS)


def sample_documents(inputs: Sequence[str], options: CorpusOptions) -> Iterator[str]:
    """Yields training documents from the starts of pieces that are spread over all files, about
    SAMPLE_LENGTH characters of them."""
    pieces = split_files(find_files(inputs).files, options.shard_bytes)
    step = max(len(pieces) * PIECE_SAMPLE_LENGTH // SAMPLE_LENGTH, 1)
    for piece in pieces[::step]:
        left = max(SAMPLE_LENGTH // len(pieces[::step]), PIECE_SAMPLE_LENGTH)
        for text in read_piece(piece, options.text_field, lambda problem: None):
            # Held-out documents must not have an influence on the vocabulary.
            if split_of(text.encode("utf-8"), options.validation_fraction) != "training":
                continue
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


class ProgressReport:
    """Shows the progress as a bar in a terminal, and otherwise as a line now and then."""

    SECONDS = 30
    """Time between lines."""

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
        self._last_line = time.monotonic()

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def start(self, units: int, size: int) -> UnitCallback:
        """Starts the report: the `start_progress` of `corpus_writer.write_corpus`."""
        task = self._bar.add_task("preparing", total=size, tokens=0)

        def report_unit(unit: WorkUnit, result: UnitResult) -> None:
            self._finished += 1
            self._tokens += sum(shard.tokens for shard in result.shards)
            self._bar.update(task, advance=unit.size, tokens=self._tokens)
            now = time.monotonic()
            if self._bar.disable and now - self._last_line > self.SECONDS:
                self._last_line = now
                print(f"{self._finished} of {units} units, {self._tokens:,} tokens", flush=True)

        return report_unit


def print_summary(out: Path, manifest: CorpusManifest) -> None:
    """Prints the sizes of a corpus, and how to train on it."""
    for split in SPLITS:
        print(
            f"{split}: {counted(manifest.total(split, 'documents'), 'document')}, "
            f"{counted(manifest.total(split, 'tokens'), 'token')}, "
            f"{counted(manifest.total(split, 'text_bytes'), 'byte')} of text"
        )
    if count := manifest.empty_documents:
        print(
            f"left out: {counted(count, 'document')} that {'was' if count == 1 else 'were'} empty"
        )
    if count := manifest.broken_documents:
        print(f"left out: {counted(count, 'document')} that could not be read")
    print(f'the corpus is in {out}; train on it with --data.sources \'[{{"path": "{out}"}}]\'')
