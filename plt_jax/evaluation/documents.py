"""Perplexity document by document, with overlapping windows for long documents.

A token sees the part of its own document before it, as far as the context reaches, less at most
`stride - 1` positions. In the packed examples of perplexity.py it may see far less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from plt_jax.config import MeshConfig, ModelConfig
from plt_jax.data.corpus import load_corpus, read_documents
from plt_jax.data.load import check_held_out, check_same_tokenizer, open_sources, validation_stream
from plt_jax.data.streams import DocumentStream, TokenStream
from plt_jax.data.token_bytes import token_bytes
from plt_jax.data.tokenized_corpus import open_tokenized_corpus
from plt_jax.data.tokens import tokenize
from plt_jax.distributed.mesh import make_mesh, whole_batch
from plt_jax.errors import InputError, naming
from plt_jax.evaluation.likelihood import Scored, in_batches, nll_by_loop
from plt_jax.evaluation.perplexity import score
from plt_jax.evaluation.results import write_results
from plt_jax.files.writing import to_json
from plt_jax.reports.tables import table_of
from plt_jax.runs.directory import Trained, open_trained

DOCUMENTS, EACH = "documents.json", "documents.jsonl"
GROUP_SIZE = 1024
"""The number of documents that are in memory together and batched by length."""
READ_TOKENS = 2**20
"""The number of tokens that are read from a corpus at once."""

COLUMNS = (
    ("tokens", "tokens", "{:,}"),
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("bits_per_byte", "bits per byte", "{:.4f}"),
)


class DocumentReport(NamedTuple):
    """The scores of a model on documents, and the file that holds them."""

    numbers: dict[str, Any]
    """The content of documents.json: scores over all documents `by_loop`, and scores of the last
    loop `by_position` in the document."""
    path: Path

    def table(self) -> str:
        """A table with a line per loop and a line per range of positions."""
        loops = [row | {"label": f"loop {row['loop']}"} for row in self.numbers["by_loop"]]
        places = [
            row | {"label": f"position {row['first']} to {row['last']}"}
            for row in self.numbers["by_position"]
        ]
        return table_of(COLUMNS, [*loops, *places])


def evaluate_documents(
    path: str,
    text: str | None = None,
    corpus: str | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> DocumentReport:
    """Evaluates a run or checkpoint document by document; writes documents.json, and a line for
    each document in documents.jsonl.

    Args:
      text: a text file, or a folder of .txt files, to evaluate on instead of the run's held-out
        documents.
      corpus: a tokenized corpus, whose held-out documents are evaluated instead.
      stride: new tokens of each window but the first; default half the context.
      limit: the number of documents to evaluate, from the first one on.
      batch_size: windows on all devices together, raised to divide over them; default the run's
        evaluation.batch_size.
      mesh: the devices, which share batches and parameters; default all of them, along the data
        axis.
      dtype: dtype of the parameters; see `read_params`.

    Raises:
      InputError: no such checkpoint, text or corpus, the corpus has another tokenizer, or an
        argument is out of its range.
    """
    if text is not None and corpus is not None:
        raise InputError("--text and --corpus exclude one another; give one of them")
    for name, value in (("--stride", stride), ("--limit", limit), ("--batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    mesh = mesh or make_mesh(MeshConfig())
    trained = open_trained(path, mesh, dtype=dtype)
    config = trained.config.model
    stride = stride or max(config.max_length // 2, 1)
    if stride > config.max_length:
        raise InputError(
            f"--stride is {stride}, but the context holds {config.max_length} (model.max_length); "
            "lower it"
        )
    documents = islice(documents_of(stream_of(trained, text, corpus)), limit)
    target = trained.directory / DOCUMENTS
    sums = Sums(config.loop.count)
    bytes_V = token_bytes(trained.tokenizer, config.vocab_size)
    size = whole_batch(batch_size or trained.config.evaluation.batch_size, mesh)
    rows = measure(trained, mesh, documents, stride, size, bytes_V, sums)
    write_results(trained.directory / EACH, (to_json(row) + "\n" for row in rows))
    if not sums.tokens:
        raise InputError("the text holds no token to predict; give a longer one (--text)")
    numbers = {
        "step": trained.step,
        "text": corpus or text or f"held out from {trained.config.data.text}",
        "context": config.max_length,
        "stride": stride,
        **sums.to_json(),
    }
    write_results(target, [to_json(numbers, indent=2), "\n"])
    return DocumentReport(numbers, target)


def stream_of(trained: Trained, text: str | None, corpus: str | None) -> TokenStream:
    """The tokenized documents to evaluate on: those of a text, of a corpus, or the run's held-out
    documents.

    Raises:
      InputError: there are none, they cannot be read, or the corpus has another tokenizer.
    """
    config, tokenizer = trained.config, trained.tokenizer
    if corpus is not None:
        with naming("--corpus"):
            opened = open_tokenized_corpus(corpus, config.data)
            if opened.tokenizer.identity != tokenizer.identity:
                raise InputError(
                    f"{corpus} was prepared with another tokenizer than the run's; prepare it "
                    "again with that (--tokenizer RUN/tokenizer.json)"
                )
            return validation_stream([opened])
    if text is not None:
        return DocumentStream(tokenize(read_documents(text), tokenizer, config.data.cache_dir))
    check_held_out(config)
    if config.data.synthetic.task != "none":
        raise InputError(
            f"{trained.directory} was trained on a synthetic task, which has no documents; test it "
            "with --exact_match, or give a --text"
        )
    if config.data.sources:
        corpora = open_sources(config)
        check_same_tokenizer(config, corpora, tokenizer)
        return validation_stream(corpora)
    documents = load_corpus(config.data).validation
    return DocumentStream(tokenize(documents, tokenizer, config.data.cache_dir))


def documents_of(stream: TokenStream) -> Iterator[np.ndarray]:
    """The documents of a stream one by one: tokens [n] with bos and eos, for any length n."""
    pieces: list[np.ndarray] = []
    last = None
    for begin in range(0, len(stream), READ_TOKENS):
        tokens, numbers = stream.read(begin, READ_TOKENS)
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        for piece, number in zip(
            np.split(tokens, cuts), numbers[np.concatenate([[0], cuts])], strict=True
        ):
            if last is not None and number != last:
                yield np.concatenate(pieces)
                pieces = []
            last = number
            pieces.append(piece)
    if pieces:
        yield np.concatenate(pieces)


def windows_of(document: np.ndarray, context: int, stride: int) -> Iterator[Scored]:
    """Windows that score every token of a document once, except the first token.

    The first window scores as many tokens as the context predicts. Each further window scores
    `stride` tokens and begins with as many earlier tokens as fit.
    """
    scored = 1
    while scored < len(document):
        end = min(context + 1 if scored == 1 else scored + stride, len(document))
        start = max(end - context - 1, 0)
        yield Scored(
            document[start:end], scored - start
        )  # a view, because windows may overlap by far
        scored = end


class Sums:
    """Sums over all documents so far, by loop and by position."""

    def __init__(self, loops: int):
        self.nats_L = np.zeros(loops)
        self.tokens = self.text_bytes = self.documents = 0
        self._buckets: dict[int, np.ndarray] = {}
        """Tokens, nats and bytes of each bucket of positions, by the bucket's number."""

    def add(self, nll_Ln: np.ndarray, bytes_n: np.ndarray) -> None:
        """Adds a document.

        Args:
          nll_Ln: negative log-likelihoods of its tokens except the first, in nats, [L, n].
          bytes_n: UTF-8 bytes that these tokens stand for, [n].
        """
        self.nats_L += nll_Ln.sum(axis=1)
        self.tokens += nll_Ln.shape[1]
        self.text_bytes += int(bytes_n.sum())
        self.documents += 1
        # Positions 1, 2 to 3, 4 to 7, ...
        bucket_n = np.log2(np.arange(1, nll_Ln.shape[1] + 1)).astype(int)
        for bucket in np.unique(bucket_n).tolist():
            chosen = bucket_n == bucket
            added = [chosen.sum(), nll_Ln[-1, chosen].sum(), bytes_n[chosen].sum()]
            self._buckets[bucket] = self._buckets.get(bucket, np.zeros(3)) + added

    def to_json(self) -> dict[str, Any]:
        """Scores over all documents, in the form of documents.json."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "by_loop": [
                {
                    "loop": loop,
                    "tokens": self.tokens,
                    **score(nats, self.tokens, self.text_bytes)._asdict(),
                }
                for loop, nats in enumerate(self.nats_L, start=1)
            ],
            "by_position": [
                {
                    "first": 2**bucket,
                    "last": 2 ** (bucket + 1) - 1,
                    "tokens": int(tokens),
                    **score(nats, int(tokens), int(text_bytes))._asdict(),
                }
                for bucket, (tokens, nats, text_bytes) in sorted(self._buckets.items())
            ],
        }


def measure(
    trained: Trained,
    mesh: Mesh,
    documents: Iterator[np.ndarray],
    stride: int,
    batch_size: int,
    bytes_V: np.ndarray,
    sums: Sums,
) -> Iterator[dict[str, Any]]:
    """Yields a row of documents.jsonl for each document, in order, and adds it to `sums`."""
    config = trained.config.model
    number = 0
    while group := list(islice(documents, GROUP_SIZE)):
        for document, nll_Ln in zip(
            group, nll_of(config, trained.params, mesh, group, stride, batch_size), strict=True
        ):
            bytes_n = bytes_V[document[1:]]
            sums.add(nll_Ln, bytes_n)
            nats, tokens, text_bytes = float(nll_Ln[-1].sum()), len(bytes_n), int(bytes_n.sum())
            yield {
                "document": number,
                "tokens": tokens,
                "bytes": text_bytes,
                "loss": nats / max(tokens, 1),
                "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
            }
            number += 1


def nll_of(
    config: ModelConfig,
    params: Any,
    mesh: Mesh,
    documents: list[np.ndarray],
    stride: int,
    batch_size: int,
) -> list[np.ndarray]:
    """Negative log-likelihoods of each document's tokens except the first, float64 [L, n]."""
    windows = [list(windows_of(one, config.max_length, stride)) for one in documents]
    owners = [(index, place) for index, own in enumerate(windows) for place in range(len(own))]
    parts: list[list[Any]] = [[None] * len(own) for own in windows]
    sequences = [windows[index][place] for index, place in owners]
    compute = partial(nll_by_loop, config, params)
    for which, (nll_Ln,) in in_batches(config, mesh, sequences, batch_size, compute):
        index, place = owners[which]
        parts[index][place] = nll_Ln.astype(np.float64)
    nothing = np.zeros((config.loop.count, 0))
    return [np.concatenate([nothing, *own], axis=1) for own in parts]
