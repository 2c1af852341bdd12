"""All of a run's data from its configuration."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer

from plt_jax.config import RunConfig
from plt_jax.data.corpus import load_corpus
from plt_jax.data.packing import PackedExamples
from plt_jax.data.pipeline import training_dataset
from plt_jax.data.tokenizer import token_bytes, tokenizer_for
from plt_jax.data.tokens import TokenizedDocuments, tokenize


class Data(NamedTuple):
    """What a training run reads."""

    tokenizer: Tokenizer
    training: grain.IterDataset
    """Endless batches, see `pipeline.training_dataset`."""
    validation: PackedExamples
    """Held-out examples, for `pipeline.evaluation_batches`."""
    token_bytes: np.ndarray
    """int32 [V], UTF-8 bytes of each token, for bits per byte."""
    counts: dict[str, int]
    """{training,validation}_{documents,tokens,bytes}; tokens include bos and eos."""


def load_data(config: RunConfig, rows: np.ndarray | None = None) -> Data:
    """Reads the text, trains or loads the tokenizer, and packs both parts of the text.

    Args:
      rows: numbers of the rows of a training batch that this process reads; default all.

    Raises:
      InputError: the text, the tokenizer or the cache folder cannot be used, or the text is too
        short for one batch; see the functions that this calls.
    """
    corpus = load_corpus(config.data)
    tokenizer = tokenizer_for(config, corpus.training)
    training = tokenize(corpus.training, tokenizer, config.data.cache_dir)
    validation = tokenize(corpus.validation, tokenizer, config.data.cache_dir)
    return Data(
        tokenizer,
        training_dataset(config, training, rows),
        PackedExamples(validation, config.sequence_length),
        token_bytes(tokenizer, config.model.vocab_size),
        _counts("training", corpus.training, training)
        | _counts("validation", corpus.validation, validation),
    )


def validation_examples(config: RunConfig, tokenizer: Tokenizer) -> PackedExamples:
    """The validation part of `load_data` for a tokenizer at hand, such as a run directory's.

    Raises:
      InputError: as `load_data`.
    """
    documents = load_corpus(config.data).validation
    return examples_from_text(documents, tokenizer, config.sequence_length, config.data.cache_dir)


def examples_from_text(
    documents: Sequence[str], tokenizer: Tokenizer, sequence_length: int, cache_dir: str
) -> PackedExamples:
    """Documents, such as `corpus.read_documents` gives them, as examples to evaluate on.

    Raises:
      InputError: the cache folder cannot be written to.
    """
    return PackedExamples(tokenize(documents, tokenizer, cache_dir), sequence_length)


def _counts(part: str, documents: Sequence[str], tokenized: TokenizedDocuments) -> dict[str, int]:
    return {
        f"{part}_documents": len(documents),
        f"{part}_tokens": len(tokenized.tokens),
        f"{part}_bytes": sum(len(document.encode("utf-8")) for document in documents),
    }
