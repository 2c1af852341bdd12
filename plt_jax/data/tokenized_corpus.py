"""Tokenized corpora: folders that `python -m plt_jax.data.prepare` writes and training reads.

manifest.json                   lists the shards; written last, so a folder that has it is complete
tokenizer.json                  the tokenizer (Hugging Face tokenizers)
training-NNNNN.array_record     shards of tokens, see `shards.py`
validation-NNNNN.array_record   shards of the held-out documents
parts/                          what `corpus_writer.py` needs to write a missing shard again
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pydantic
from pydantic import NonNegativeInt

from plt_jax.buckets.address import is_in_bucket
from plt_jax.config.data import DataConfig
from plt_jax.config.types import Section
from plt_jax.data.shard_cache import ShardCache, fetch_shard, shard_cache
from plt_jax.data.shards import Shard, ShardReader, Split, damaged_file, missing_file
from plt_jax.data.special_tokens import SPECIAL_TOKENS
from plt_jax.data.streams import JoinedStream, TokenStream
from plt_jax.data.tokenizer import TOKENIZER, TextTokenizer, load_tokenizer
from plt_jax.errors import InputError
from plt_jax.files.paths import check_reachable, expand, states_below
from plt_jax.files.reading import MOST_JSON_BYTES, check_regular, file_below, read_bounded

MANIFEST = "manifest.json"
OPEN_SHARDS = 64
"""Most shards of a split that are open at once; an open shard holds an index of its records."""

Count = Literal["tokens", "documents", "text_bytes"]


class CorpusManifest(Section):
    """Contents of a tokenized corpus; manifest.json holds it."""

    format: Literal[1] = 1
    token_bytes: Literal[2, 4]
    """Bytes of a token id."""
    tokenizer_sha256: str
    """SHA-256 of tokenizer.json, in hexadecimal."""
    special_tokens_sha256: str | None = None
    """SHA-256 of special_tokens.json, in hexadecimal; None in corpora of earlier versions."""
    made_from: dict[str, object]
    """The input files, each with its path, size and time of change, and the options."""
    empty_documents: NonNegativeInt
    """Documents left out because they held only white space."""
    broken_documents: NonNegativeInt
    """Documents left out because they could not be read (--skip_broken)."""
    shards: tuple[Shard, ...]

    def total(self, split: Split, what: Count) -> int:
        """The sum of one field over the shards of a split."""
        return sum(getattr(shard, what) for shard in self.shards if shard.split == split)


class TokenizedCorpus(NamedTuple):
    """An open corpus; all of it has been checked except the contents of its shards."""

    folder: Path
    manifest: CorpusManifest
    fingerprint: str
    """Equal for corpora with the same shards and tokenizer, in whatever folders they are."""
    tokenizer: TextTokenizer
    cache: ShardCache | None
    """Where shards are kept that are fetched from a bucket; None for a corpus on a disk."""

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split, in their order."""
        return [shard for shard in self.manifest.shards if shard.split == split]

    def stream(self, split: Split) -> JoinedStream:
        """Returns the documents of a split, in the order of its shards, without opening a shard.

        The stream's memory grows with the number of shards, not of documents or tokens. Reading
        from it raises InputError where a shard is missing or damaged, and FailedError where it
        cannot be fetched from its bucket.
        """
        shards, cache = self.shards(split), self.cache
        dtype = np.dtype(f"<u{self.manifest.token_bytes}")

        @functools.lru_cache(OPEN_SHARDS)
        def open_shard(index: int) -> TokenStream:
            shard = shards[index]
            if cache is None:
                return ShardReader(file_below(self.folder, shard.name), shard.tokens, dtype)
            if split == "validation":  # which is read in its order
                for following in shards[index + 1 : index + 2]:
                    cache.request(self.folder / following.name, following)
            return cache.open(self.folder / shard.name, shard, dtype)

        return JoinedStream([shard.tokens for shard in shards], open_shard)

    def request(self, split: Split) -> Callable[[int, int], None]:
        """Returns a function that begins to fetch the shards of a span of `stream(split)`; its
        arguments are the span's first token and its length."""
        shards, stream, cache = self.shards(split), self.stream(split), self.cache
        assert cache is not None, "a corpus on a disk has nothing to fetch"

        def request(begin: int, length: int) -> None:
            for index in stream.streams_in(begin, length):
                cache.request(self.folder / shards[index].name, shards[index])

        return request


def open_tokenized_corpus(folder: str | Path, config: DataConfig = DataConfig()) -> TokenizedCorpus:
    """Opens a tokenized corpus.

    Args:
      folder: a folder, or a path in a bucket.
      config: says where the shards of a corpus in a bucket are kept; `cache_dir` and `cache_gb` are
        read.

    Raises:
      InputError: the folder is not a tokenized corpus, it is not finished, or one of its files is
        missing or has another size; or its shards cannot be kept in the cache.
    """
    folder = expand(folder)
    check_reachable(folder)
    manifest = read_corpus_manifest(folder)
    check_sizes(folder, manifest.shards)
    cache = None
    if is_in_bucket(folder):
        cache = shard_cache(expand(config.cache_dir) / "shards", round(config.cache_gb * 1e9))
        cache.check_room(manifest.shards)
    _check_tokenizer(folder, manifest)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    parts = [manifest.tokenizer_sha256, *(shard.sha256 for shard in manifest.shards)]
    if not tokenizer.says_all:
        parts.append(tokenizer.special.to_json())
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return TokenizedCorpus(folder, manifest, fingerprint, tokenizer, cache)


def read_corpus_manifest(folder: Path) -> CorpusManifest:
    """Reads a corpus's manifest.

    Raises:
      InputError: the manifest is missing, cannot be read, or is broken.
    """
    path = folder / MANIFEST
    try:
        return CorpusManifest.model_validate_json(read_bounded(path, MOST_JSON_BYTES))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is not a tokenized corpus, or is not finished: {MANIFEST} is missing; write "
            f"it with python -m plt_jax.data.prepare --out {folder}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    except pydantic.ValidationError as error:
        raise InputError(
            f"{path} is damaged, or from another version of plt_jax; prepare the corpus again"
        ) from error


def find_problems(folder: Path) -> list[str]:
    """Checks all files of a corpus; returns a line for each that is missing or damaged.

    Raises:
      InputError: the folder is not a tokenized corpus, or cannot be read.
      FailedError: its bucket does not answer.
    """
    check_reachable(folder)
    manifest = read_corpus_manifest(folder)
    sizes = _sizes_in_bucket(folder)
    dtype = np.dtype(f"<u{manifest.token_bytes}")

    def check(shard: Shard) -> str | None:
        try:
            path = file_below(folder, shard.name)
            _check_size(path, shard, sizes)
            if is_in_bucket(path):
                with tempfile.NamedTemporaryFile(prefix="plt_jax-") as copy:
                    fetch_shard(path, shard, Path(copy.name))
                    reader = ShardReader(Path(copy.name), shard.tokens, dtype, path)
            else:
                check_sha256(path, shard.sha256)
                reader = ShardReader(path, shard.tokens, dtype)
            reader.check_documents(shard.documents)
        except InputError as error:
            return str(error)
        return None

    problems = []
    try:
        _check_tokenizer(folder, manifest)
    except InputError as error:
        problems.append(str(error))
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        problems += [problem for problem in threads.map(check, manifest.shards) if problem]
    return problems


def _check_tokenizer(folder: Path, manifest: CorpusManifest) -> None:
    """Raises InputError where a file of the tokenizer is missing or not as it was written."""
    check_sha256(folder / TOKENIZER, manifest.tokenizer_sha256)
    if manifest.special_tokens_sha256 is not None:
        check_sha256(folder / SPECIAL_TOKENS, manifest.special_tokens_sha256)


def check_sizes(folder: Path, shards: Sequence[Shard]) -> None:
    """Raises InputError where a shard is missing, or its size is not the manifest's."""
    sizes = _sizes_in_bucket(folder)
    for shard in shards:
        _check_size(file_below(folder, shard.name), shard, sizes)


def _sizes_in_bucket(folder: Path) -> dict[str, int] | None:
    """Bytes of a corpus's objects by their names, from one listing; None for one on a disk.

    Raises:
      InputError: the bucket cannot be read.
    """
    if not is_in_bucket(folder):
        return None
    try:
        return {name: state.size for name, state in states_below(folder).items()}
    except OSError as error:
        raise InputError(f"cannot read {folder} ({error.strerror})") from error


def _check_size(path: Path, shard: Shard, in_bucket: Mapping[str, int] | None) -> None:
    try:
        size = path.stat().st_size if in_bucket is None else in_bucket.get(shard.name)
    except OSError as error:
        raise missing_file(path, error.strerror) from error
    if size is None:
        raise missing_file(path)
    if size != shard.size:
        raise damaged_file(path, f"it has {size:,} bytes instead of {shard.size:,}")


def check_sha256(path: Path, expected: str) -> None:
    """Raises InputError where a file cannot be read, or its SHA-256 is not the expected one."""
    check_regular(path)
    try:
        found = file_sha256(path)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    if found != expected:
        raise damaged_file(path, "its SHA-256 is not the manifest's")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
