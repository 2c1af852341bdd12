"""All of a run's data from its configuration: text at hand, prepared corpora, or questions."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer

from plt_jax.config import RunConfig
from plt_jax.data.cache import fingerprint
from plt_jax.data.corpus import load_corpus, read_documents
from plt_jax.data.corpus_reader import SPLITS, Prepared, open_prepared
from plt_jax.data.packing import Examples, PackedExamples
from plt_jax.data.pipeline import Source, batches_of, epochs_read, training_dataset
from plt_jax.data.streams import DocumentStream, JoinedStream, TokenStream
from plt_jax.data.synthetic_examples import SyntheticExamples, byte_tokenizer, check_test_set
from plt_jax.data.tokenizer import check_size, named_tokenizer, token_bytes, tokenizer_for
from plt_jax.data.tokens import TokenizedDocuments, tokenize
from plt_jax.errors import InputError, naming


class Data(NamedTuple):
    """What a training run reads."""

    tokenizer: Tokenizer
    training: grain.IterDataset
    """Endless batches, see `pipeline.batches_of`."""
    validation: Examples
    """Held-out examples, for `pipeline.evaluation_batches`."""
    token_bytes: np.ndarray
    """int32 [V], UTF-8 bytes of each token, for bits per byte."""
    bytes_per_target: float
    """UTF-8 bytes that a target stands for in training, on average."""
    about: list[str]
    """What is read, in lines for people."""
    fingerprint: str
    """The same for the same documents as the same tokens."""


class _Text(NamedTuple):
    """Documents as tokens."""

    tokenizer: Tokenizer
    training: list[Source]
    validation: TokenStream
    counts: dict[str, int]
    """{training,validation}_{documents,tokens,bytes}; tokens include bos and eos."""
    fingerprint: str


def load_data(config: RunConfig, rows: np.ndarray | None = None) -> Data:
    """Reads the text, trains or loads the tokenizer, and packs both parts of the text.

    Args:
      rows: numbers of the rows of a training batch that this process reads; default all.

    Raises:
      InputError: the text, the tokenizer or the cache folder cannot be used, or the text is too
        short for one batch; see the functions that this calls.
    """
    if config.data.synthetic.task != "none":
        return _load_synthetic(config, rows)
    text = _from_prepared(config) if config.data.sources else _from_text(config)
    counts = text.counts
    targets = counts["training_tokens"] - counts["training_documents"]  # all but each bos
    return Data(
        text.tokenizer,
        training_dataset(config, text.training, rows),
        PackedExamples(text.validation, config.sequence_length),
        token_bytes(text.tokenizer, config.model.vocab_size),
        counts["training_bytes"] / targets,
        [*_count_lines(counts), *_epoch_lines(config, text.training)],
        text.fingerprint,
    )


def validation_examples(config: RunConfig, tokenizer: Tokenizer) -> Examples:
    """The validation part of `load_data` for a tokenizer at hand, such as a run directory's.

    Raises:
      InputError: as `load_data`.
    """
    if config.data.synthetic.task != "none":
        return SyntheticExamples(config, tokenizer, held_out=True)
    if config.data.sources:
        corpora = open_sources(config)
        check_same_tokenizer(config, corpora, tokenizer)
        return PackedExamples(held_out(corpora), config.sequence_length)
    documents = load_corpus(config.data).validation
    return examples_from_text(documents, tokenizer, config.sequence_length, config.data.cache_dir)


def examples_for(config: RunConfig, tokenizer: Tokenizer, text: str | None) -> Examples:
    """The examples to evaluate on: of a text file or folder, by default the run's held-out text.

    Raises:
      InputError: as `load_data`, or no such text.
    """
    if text is None:
        return validation_examples(config, tokenizer)
    documents = read_documents(text)
    return examples_from_text(documents, tokenizer, config.sequence_length, config.data.cache_dir)


def examples_from_text(
    documents: Sequence[str], tokenizer: Tokenizer, sequence_length: int, cache_dir: str
) -> PackedExamples:
    """Documents, such as `corpus.read_documents` gives them, as examples to evaluate on.

    Raises:
      InputError: the cache folder cannot be written to.
    """
    stream = DocumentStream(tokenize(documents, tokenizer, cache_dir))
    return PackedExamples(stream, sequence_length)


def open_sources(config: RunConfig) -> list[Prepared]:
    """The prepared corpora of a configuration.

    Raises:
      InputError: one cannot be used, or they were made with different tokenizers.
    """
    with naming("data.sources"):
        corpora = [open_prepared(source.path) for source in config.data.sources]
    check_same_tokenizer(config, corpora, corpora[0].tokenizer)
    return corpora


def check_same_tokenizer(
    config: RunConfig, corpora: Sequence[Prepared], tokenizer: Tokenizer
) -> None:
    """Raises InputError where a corpus was made with another tokenizer."""
    for source, corpus in zip(config.data.sources, corpora, strict=True):
        if corpus.tokenizer.to_str() != tokenizer.to_str():
            raise InputError(
                f"data.sources {source.path} was prepared with another tokenizer than the other "
                "sources or the run; prepare it again with theirs (--tokenizer)"
            )


def held_out(corpora: Sequence[Prepared]) -> JoinedStream:
    """The validation documents of corpora, one corpus after the other.

    Raises:
      InputError: none has any.
    """
    streams = [stream for corpus in corpora if len(stream := corpus.stream("validation"))]
    if not streams:
        raise InputError(
            "data.sources hold no documents for validation; prepare one of them with a larger "
            "--validation_fraction"
        )
    return JoinedStream([len(stream) for stream in streams], streams.__getitem__)


def _from_text(config: RunConfig) -> _Text:
    corpus = load_corpus(config.data)
    tokenizer = tokenizer_for(config, corpus.training)
    training = tokenize(corpus.training, tokenizer, config.data.cache_dir)
    validation = tokenize(corpus.validation, tokenizer, config.data.cache_dir)
    return _Text(
        tokenizer,
        [
            Source(
                f"data.source {config.data.source}",
                DocumentStream(training, shuffle_seed=config.seed),
            )
        ],
        DocumentStream(validation),
        _counts("training", corpus.training, training)
        | _counts("validation", corpus.validation, validation),
        fingerprint([tokenizer.to_str(), *corpus.training, "", *corpus.validation]),
    )


def _from_prepared(config: RunConfig) -> _Text:
    corpora = open_sources(config)
    tokenizer = corpora[0].tokenizer
    if config.tokenizer.path is not None:
        check_same_tokenizer(config, corpora, named_tokenizer(config.tokenizer.path))
    with naming("data.sources"):
        check_size(tokenizer, config.model.vocab_size)
    sources = [
        Source(
            f"data.sources {source.path}", corpus.stream("training"), source.weight, source.epochs
        )
        for source, corpus in zip(config.data.sources, corpora, strict=True)
    ]
    fields = {"documents": "documents", "tokens": "tokens", "bytes": "text_bytes"}
    counts = {
        f"{split}_{name}": sum(corpus.manifest.total(split, field) for corpus in corpora)
        for split in SPLITS
        for name, field in fields.items()
    }
    identity = fingerprint([corpus.fingerprint for corpus in corpora])
    return _Text(tokenizer, sources, held_out(corpora), counts, identity)


def _load_synthetic(config: RunConfig, rows: np.ndarray | None) -> Data:
    task = config.data.synthetic
    tokenizer = byte_tokenizer(config)
    bytes_V = token_bytes(tokenizer, config.model.vocab_size)
    training = SyntheticExamples(config, tokenizer, held_out=False)
    validation = SyntheticExamples(config, tokenizer, held_out=True)
    check_test_set(task, config.model.max_length)
    sample = [training[index] for index in range(len(validation))]
    targets = sum(example["weights"].sum() for example in sample)
    sizes = [example["weights"] * bytes_V[example["targets"]] for example in sample]
    difficulties = ", ".join(map(str, task.difficulties))
    return Data(
        tokenizer,
        batches_of(config, training, rows),
        validation,
        bytes_V,
        float(np.sum(sizes) / targets),
        [f"training on {config.data.text}, difficulties {difficulties}, generated as needed"],
        fingerprint([task.model_dump_json(exclude={"test_difficulties"})]),
    )


def _count_lines(counts: dict[str, int]) -> list[str]:
    return [
        f"{part} text: {counts[f'{part}_documents']} documents, "
        f"{counts[f'{part}_tokens']:,} tokens, {counts[f'{part}_bytes']:,} bytes"
        for part in ("training", "validation")
    ]


def _epoch_lines(config: RunConfig, sources: list[Source]) -> list[str]:
    return [
        f"{name} is read {epochs:.3g} times in {config.training.steps:,} steps"
        for name, epochs in epochs_read(config, sources).items()
    ]


def _counts(part: str, documents: Sequence[str], tokenized: TokenizedDocuments) -> dict[str, int]:
    return {
        f"{part}_documents": len(documents),
        f"{part}_tokens": len(tokenized.tokens),
        f"{part}_bytes": sum(len(document.encode("utf-8")) for document in documents),
    }
