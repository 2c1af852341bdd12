"""Prepared corpora: folders that `python -m plt_jax.data.prepare` makes, and training reads.

manifest.json                   what the corpus holds; written last, so that it is there if all is
tokenizer.json                  the tokenizer (Hugging Face tokenizers)
training-NNNNN.array_record     shards of tokens, see `shards.py`
validation-NNNNN.array_record   the same, of documents held out
parts/                          what `corpus_writer.py` needs to make a missing shard again
"""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pydantic
from pydantic import NonNegativeInt, PositiveInt
from tokenizers import Tokenizer

from plt_jax.config.types import Section
from plt_jax.data.shards import ShardReader
from plt_jax.data.streams import JoinedStream
from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.errors import InputError
from plt_jax.files import expand

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
OPEN_SHARDS = 64
"""Shards kept open at a time, whatever their number: an open one keeps its records' places."""

Split = Literal["training", "validation"]
SPLITS: tuple[Split, ...] = ("training", "validation")


class Shard(Section):
    """One file of tokens."""

    name: str
    """In the corpus's folder."""
    split: Split
    tokens: PositiveInt
    """bos and eos included."""
    documents: PositiveInt
    text_bytes: NonNegativeInt
    """Of the documents, in UTF-8."""
    size: PositiveInt
    """Of the file, in bytes."""
    sha256: str
    """Of the file."""


class Manifest(Section):
    """What a prepared corpus holds."""

    format: Literal[1] = 1
    token_bytes: Literal[2, 4]
    """Of a token id."""
    tokenizer_sha256: str
    """Of tokenizer.json."""
    made_from: dict[str, object]
    """The files, by path, size and time, and the options."""
    empty_documents: NonNegativeInt
    """Left out, because they were white space alone."""
    broken_documents: NonNegativeInt
    """Left out, because they could not be read (--skip_broken)."""
    shards: tuple[Shard, ...]

    def total(self, split: Split, what: Literal["tokens", "documents", "text_bytes"]) -> int:
        """A sum over a split's shards."""
        return sum(getattr(shard, what) for shard in self.shards if shard.split == split)


class Prepared(NamedTuple):
    """A prepared corpus, checked but for the contents of its shards."""

    folder: Path
    manifest: Manifest
    fingerprint: str
    """The same for the same shards and tokenizer, wherever they are."""
    tokenizer: Tokenizer

    def stream(self, split: Split) -> JoinedStream:
        """A split's documents, in the order of its shards; opens no shard yet.

        Memory grows with the number of shards, not of documents or tokens. Reading raises
        InputError where a shard is missing or damaged.
        """
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        dtype = np.dtype(f"<u{self.manifest.token_bytes}")

        @functools.lru_cache(OPEN_SHARDS)
        def open_shard(index: int) -> ShardReader:
            return ShardReader(self.folder / shards[index].name, shards[index].tokens, dtype)

        return JoinedStream([shard.tokens for shard in shards], open_shard)


def open_prepared(folder: str | Path) -> Prepared:
    """Opens a prepared corpus.

    Raises:
      InputError: it is none, is not finished, or a file of it is missing or has another size.
    """
    folder = expand(folder)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        check_size(folder, shard)
    check_sha256(folder / TOKENIZER, manifest.tokenizer_sha256)
    parts = [manifest.tokenizer_sha256, *(shard.sha256 for shard in manifest.shards)]
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return Prepared(folder, manifest, fingerprint, load_tokenizer(folder / TOKENIZER))


def read_manifest(folder: Path) -> Manifest:
    """Reads a corpus's manifest.

    Raises:
      InputError: there is none, or it is broken.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is no prepared corpus, or not finished: {MANIFEST} is missing; make it "
            f"with python -m plt_jax.data.prepare --out {folder}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    except (UnicodeDecodeError, pydantic.ValidationError) as error:
        raise InputError(
            f"{path} is damaged, or of another version of plt_jax; prepare the corpus again"
        ) from error


def find_problems(folder: Path) -> list[str]:
    """A line for each file that is missing or damaged.

    Raises:
      InputError: the folder is no prepared corpus.
    """
    manifest = read_manifest(folder)

    def check(shard: Shard) -> str | None:
        try:
            check_size(folder, shard)
            check_sha256(folder / shard.name, shard.sha256)
        except InputError as error:
            return str(error)

    problems = []
    try:
        check_sha256(folder / TOKENIZER, manifest.tokenizer_sha256)
    except InputError as error:
        problems.append(str(error))
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter's lock
        problems += [problem for problem in threads.map(check, manifest.shards) if problem]
    return problems


def check_size(folder: Path, shard: Shard) -> None:
    """Raises InputError where a shard is missing or has another size than it was written with."""
    path = folder / shard.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(
            f"the shard {path} cannot be read ({error.strerror}); bring it back, or run "
            "plt_jax.data.prepare again as before, which makes what is missing"
        ) from error
    if size != shard.size:
        raise _differs(path, f"it has {size:,} bytes instead of {shard.size:,}")


def check_sha256(path: Path, expected: str) -> None:
    """Raises InputError where a file cannot be read, or its contents are not those expected."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    if found != expected:
        raise _differs(path, "its SHA-256 is not the manifest's")


def file_sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differs(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is damaged ({reason}); bring back a good copy, or delete it and run "
        "plt_jax.data.prepare again as before, which makes what is missing"
    )
