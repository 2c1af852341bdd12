"""Small tokenized corpora: how the tests write, compare and damage them."""

from pathlib import Path

from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import Part, write_corpus
from plt_jax.data.tokenized_corpus import open_tokenized_corpus
from plt_jax.files.folders import copy_file
from plt_jax.files.paths import files_in, to_path

OPTIONS = CorpusOptions(validation_fraction=0.3, shard_bytes=3000)
"""About six shards of each split for the documents below."""


def make(
    source, out, tokenizer, options=OPTIONS, workers=1, advance=lambda unit, done: None, part=Part()
):
    out = to_path(str(out))
    return write_corpus([str(source)], out, tokenizer, options, workers, lambda *_: advance, part)


def stop_at(count: int):
    """What `make` calls with each finished unit: it stops the call at the unit of this number."""
    seen = []

    def advance(unit, done):
        seen.append(unit.index)
        if len(seen) == count:
            raise KeyboardInterrupt

    return advance


def upload(corpus: Path, to: Path) -> None:
    """Copies a corpus into a bucket."""
    for name in files_in(corpus):
        copy_file(corpus / name, to / name)


def same_corpus(one: Path | str, other: Path | str) -> bool:
    return open_tokenized_corpus(one).fingerprint == open_tokenized_corpus(other).fingerprint


def damage(path: Path, kind: str) -> None:
    contents = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        del contents[-100:]
    else:
        contents[len(contents) // 3] ^= 4
    path.write_bytes(contents)
