"""Batches of packed examples, for training and for evaluation."""

import operator
from collections.abc import Iterator
from typing import SupportsIndex

import grain
import numpy as np

from plt_jax.config import RunConfig
from plt_jax.data.packing import Example, PackedExamples
from plt_jax.data.tokens import TokenizedDocuments
from plt_jax.errors import InputError


class _Rows:
    """Some rows of every batch of an endless stream of examples, as a source for grain."""

    def __init__(self, examples: grain.MapDataset, rows: np.ndarray, batch_size: int):
        self._examples, self._rows, self._batch_size = examples, rows, batch_size

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Example:
        batch, row = divmod(operator.index(index), len(self._rows))
        return self._examples[batch * self._batch_size + int(self._rows[row])]


def training_dataset(
    config: RunConfig, tokenized: TokenizedDocuments, rows: np.ndarray | None = None
) -> grain.IterDataset:
    """Endless training batches, shuffled anew in every epoch, the same for the same seed.

    The iterator's whole state, `get_state()`, is the number of batches taken, so it resumes
    exactly, and in any number of processes.

    Args:
      config: seed, data and training are read.
      tokenized: the training documents.
      rows: numbers of the rows of each batch of B = `training.batch_size` examples to read, those
        that this process's devices hold (`sharding.BatchLayout.rows`); default all.

    Returns:
      A dataset whose elements are PackedExamples' dicts with a leading axis of len(rows).

    Raises:
      InputError: the text makes fewer than B examples.
    """
    batch_size = config.training.batch_size
    rows = np.arange(batch_size) if rows is None else rows
    examples = PackedExamples(
        tokenized, config.sequence_length, shuffle_seed=config.seed, drop_incomplete=True
    )
    if len(examples) < batch_size:
        raise InputError(
            f"the training text has {len(tokenized.tokens)} tokens, which is {len(examples)} "
            f"examples of {config.sequence_length}, fewer than training.batch_size {batch_size}; "
            "lower training.batch_size or data.sequence_length, or give more text"
        )
    shuffled = grain.MapDataset.source(examples).seed(config.seed).shuffle().repeat()
    # (Without a remainder, whose count overflows for batches of one of endless examples.)
    own = grain.MapDataset.source(_Rows(shuffled, rows, batch_size))
    batches = own.batch(len(rows), drop_remainder=True)
    prefetch = config.data.prefetch
    # Reading is mostly Python: more threads than one wait for one another, and are slower.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return batches.to_iter_dataset(options)


def evaluation_batches(
    examples: PackedExamples,
    batch_size: int,
    limit: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[Example]:
    """Every example once, in order, in batches of one shape.

    Args:
      examples: validation examples.
      batch_size: B; the last batch is filled up with rows of zeros, whose weights are 0.
      limit: read only this many examples, evenly spaced; None reads all.
      rows: numbers of the rows of each batch to read, as in `training_dataset`; default all.

    Yields:
      PackedExamples' dicts with a leading axis of len(rows).
    """
    total = len(examples)
    count = total if limit is None else min(limit, total)
    chosen = np.arange(count) * total // count
    rows = np.arange(batch_size) if rows is None else rows
    if not count:
        return
    filler = {name: np.zeros_like(values) for name, values in examples[0].items()}
    for first in range(0, count, batch_size):
        read = [examples[chosen[first + row]] if first + row < count else filler for row in rows]
        yield {name: np.stack([row[name] for row in read]) for name in filler}
