"""Batches of packed examples, for training and for evaluation."""

import operator
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, SupportsIndex

import grain
import numpy as np

from plt_jax.config import RunConfig
from plt_jax.data.packing import Example, Examples, PackedExamples
from plt_jax.data.streams import TokenStream
from plt_jax.errors import InputError


class Source(NamedTuple):
    """Documents to train on."""

    name: str
    """For messages."""
    stream: TokenStream
    weight: float | None = None
    """See SourceConfig."""
    epochs: float | None = None
    """See SourceConfig."""


class _Rows:
    """Some rows of every batch of an endless stream of examples, as a source for grain."""

    def __init__(self, examples: Examples, rows: np.ndarray, batch_size: int):
        self._examples, self._rows, self._batch_size = examples, rows, batch_size

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Example:
        batch, row = divmod(operator.index(index), len(self._rows))
        return self._examples[batch * self._batch_size + int(self._rows[row])]


class Mixture(grain.transforms.DatasetSelectionMap):
    """Interleaves endless sources in fixed proportions, each in its own order.

    Among the first n examples every source has its share of n, but for less than one example for
    each source before it.
    """

    def __init__(self, weights: Sequence[float]):
        total = sum(weights)
        self._weights = [max(round(weight / total * 10**9), 1) for weight in weights]

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` examples each source gives."""
        counts, remaining = [], sum(self._weights)
        for weight in self._weights:
            left = total * (remaining - weight) // remaining
            counts.append(total - left)
            total, remaining = left, remaining - weight
        return counts

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        before, behind = self.counts(index), self.counts(index + 1)
        source = next(k for k, count in enumerate(before) if behind[k] > count)
        return source, before[source]


def training_dataset(
    config: RunConfig, sources: Sequence[Source], rows: np.ndarray | None = None
) -> grain.IterDataset:
    """Endless training batches of text, shuffled anew in every epoch, the same for the same seed.

    No order is laid out in memory.

    Args:
      config: seed, data and training are read.
      sources: at least one.
      rows: see `batches_of`.

    Raises:
      InputError: a source makes fewer than B examples, or would be read more often than it may.
    """
    packed = _pack(config, sources)
    mixture = _mix(config, sources, [len(examples) for examples in packed])
    shuffled = [
        grain.MapDataset.source(examples).seed(config.seed + number).shuffle().repeat()
        for number, examples in enumerate(packed)
    ]
    return batches_of(config, grain.MapDataset.select_from_datasets(shuffled, mixture), rows)


def batches_of(
    config: RunConfig, examples: Examples, rows: np.ndarray | None = None
) -> grain.IterDataset:
    """Batches of endless examples, in their order.

    The iterator's whole state, `get_state()`, is the number of batches taken, so it resumes
    exactly, and in any number of processes.

    Args:
      config: data and training are read.
      rows: numbers of the rows of each batch of B = `training.batch_size` examples to read, those
        that this process's devices hold (`sharding.BatchLayout.rows`); default all.

    Returns:
      A dataset whose elements are the examples' dicts with a leading axis of len(rows).
    """
    batch_size = config.training.batch_size
    rows = np.arange(batch_size) if rows is None else rows
    # (Without a remainder, whose count overflows for batches of one of endless examples.)
    own = grain.MapDataset.source(_Rows(examples, rows, batch_size))
    batches = own.batch(len(rows), drop_remainder=True)
    prefetch = config.data.prefetch
    # Reading is mostly Python: more threads than one wait for one another, and are slower.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return batches.to_iter_dataset(options)


def epochs_read(config: RunConfig, sources: Sequence[Source]) -> dict[str, float]:
    """How often `training.steps` steps read each source, by its name.

    Raises:
      InputError: as `training_dataset`.
    """
    examples = [len(packed) for packed in _pack(config, sources)]
    read = _examples_read(config, _mix(config, sources, examples))
    return {
        source.name: wanted / count
        for source, count, wanted in zip(sources, examples, read, strict=True)
    }


def _pack(config: RunConfig, sources: Sequence[Source]) -> list[PackedExamples]:
    return [
        PackedExamples(source.stream, config.sequence_length, drop_incomplete=True)
        for source in sources
    ]


def _mix(config: RunConfig, sources: Sequence[Source], examples: Sequence[int]) -> Mixture:
    """The proportions in which sources of so many examples are read."""
    training = config.training
    for source, count in zip(sources, examples, strict=True):
        if count < training.batch_size:
            raise InputError(
                f"{source.name} has {len(source.stream)} tokens to train on, which is {count} "
                f"examples of {config.sequence_length} (data.sequence_length, by default "
                f"model.max_length), fewer than training.batch_size {training.batch_size}; lower "
                "either, hold out less (data.validation_fraction), or give more text"
            )
    mixture = Mixture(
        [
            source.weight or count * (source.epochs or 1)
            for source, count in zip(sources, examples, strict=True)
        ]
    )
    read = _examples_read(config, mixture)
    for source, count, wanted in zip(sources, examples, read, strict=True):
        if source.epochs is not None and wanted > source.epochs * count:
            raise InputError(
                f"{source.name} would be read {wanted / count:.3g} times in {training.steps} "
                f"steps, but its epochs are {source.epochs:g}; lower training.steps or its weight, "
                "or raise epochs"
            )
    return mixture


def _examples_read(config: RunConfig, mixture: Mixture) -> list[int]:
    return mixture.counts(config.training.steps * config.training.batch_size)


def evaluation_batches(
    examples: Examples,
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
      The examples' dicts with a leading axis of len(rows).
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
