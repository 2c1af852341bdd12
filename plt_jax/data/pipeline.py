"""Batches of examples, for training and for evaluation."""

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np

from plt_jax.config import RunConfig
from plt_jax.data.packing import Example, Examples, PackedExamples
from plt_jax.data.streams import TokenStream
from plt_jax.errors import InputError


class Source(NamedTuple):
    """Documents to train on, with their share of the training examples."""

    name: str
    """Name of the source in messages."""
    stream: TokenStream
    weight: float | None = None
    """`SourceConfig.weight`."""
    epochs: float | None = None
    """`SourceConfig.epochs`."""
    ahead: int = 0
    """Number of examples to request before they are read, where the tokens are far away."""
    request: Callable[[int, int], None] | None = None
    """Begins to bring them near; its arguments are the first token and their number."""


class _Shuffled:
    """Endless examples of several sources, in the order of training."""

    def __init__(self, sources: Sequence[Source], packed: Sequence[PackedExamples], order: Any):
        """
        Args:
          packed: the examples of each source.
          order: a sequence of pairs, the number of a source and that of an example of it.
        """
        self._sources, self._packed, self._order = sources, packed, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: SupportsIndex) -> Example:
        source, example = self._order[operator.index(index)]
        return self._packed[source][example]

    def request(self, index: int) -> None:
        """Begins to bring near what an example is made from."""
        source, example = self._order[index]
        if (request := self._sources[source].request) is not None:
            request(*self._packed[source].span(example))


class ReadAhead(NamedTuple):
    """How examples are requested before they are read."""

    examples: int
    """How many examples, of those that a process reads, lie between a request and its reading."""
    request: Callable[[int], None]
    """Begins to bring near what the example of an index is made from."""


class _Rows:
    """The examples of some rows of all batches, in order, as a source for grain.

    Batch i holds the examples i·B to (i+1)·B - 1.
    """

    def __init__(
        self, examples: Examples, rows: np.ndarray, batch_size: int, ahead: ReadAhead | None
    ):
        self._examples, self._rows, self._batch_size = examples, rows, batch_size
        self._ahead, self._requested = ahead, 0

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = operator.index(index)
        if self._ahead is not None:
            self._request_from(index, self._ahead)
        return self._examples[self._place(index)]

    def _place(self, index: int) -> int:
        """The example of an index among those of these rows."""
        batch, row = divmod(index, len(self._rows))
        return batch * self._batch_size + int(self._rows[row])

    def _request_from(self, index: int, ahead: ReadAhead) -> None:
        """Requests what has not been requested of an example and those that follow it."""
        end = index + ahead.examples + 1
        # A reader that resumed, or went back, is elsewhere.
        begin = self._requested if index <= self._requested <= end else index
        for later in range(begin, end):
            ahead.request(self._place(later))
        self._requested = end


class Mixture(grain.transforms.DatasetSelectionMap):
    """Interleaves endless sources in fixed proportions, and keeps each source's own order.

    Among the first n examples, the k-th source differs from its share of n by less than k examples.
    """

    def __init__(self, weights: Sequence[float]):
        total = sum(weights)
        self._weights = [max(round(weight / total * 10**9), 1) for weight in weights]

    def counts(self, total: int) -> list[int]:
        """The number of examples that each source has among the first `total`."""
        counts, remaining = [], sum(self._weights)
        for weight in self._weights:
            left = total * (remaining - weight) // remaining
            counts.append(total - left)
            total, remaining = left, remaining - weight
        return counts

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        before, after = self.counts(index), self.counts(index + 1)
        source = next(k for k, count in enumerate(before) if after[k] > count)
        return source, before[source]


def training_dataset(
    config: RunConfig, sources: Sequence[Source], rows: np.ndarray | None = None
) -> grain.IterDataset:
    """Endless training batches of text, in a new random order each epoch, which the seed decides.

    No permutation is held in memory.

    Args:
      config: the run; seed, data and training are read.
      sources: at least one source.
      rows: see `batches_of`.

    Raises:
      InputError: a source has fewer than B examples, or would be read more often than its epochs
        allow.
    """
    packed = _pack(config, sources)
    mixture = _mix(config, sources, [len(examples) for examples in packed])
    orders = [
        grain.MapDataset.range(len(examples))
        .seed(config.seed + number)
        .shuffle()
        .repeat()
        .map(functools.partial(_of_source, number))
        for number, examples in enumerate(packed)
    ]
    order = grain.MapDataset.select_from_datasets(orders, mixture)
    shuffled = _Shuffled(sources, packed, order)
    ahead = min((source.ahead for source in sources if source.ahead), default=0)
    read_ahead = ReadAhead(ahead, shuffled.request) if ahead else None
    return batches_of(config, shuffled, rows, read_ahead)


def _of_source(source: int, example: int) -> tuple[int, int]:
    return source, example


def batches_of(
    config: RunConfig,
    examples: Examples,
    rows: np.ndarray | None = None,
    ahead: ReadAhead | None = None,
) -> grain.IterDataset:
    """Batches of endless examples, in the order of the examples.

    The iterator's whole state, `get_state()`, is the number of batches taken. A run therefore
    resumes exactly, also with another number of processes.

    Args:
      config: the run; data and training are read.
      examples: endless examples, those of batch i being i·B to (i+1)·B - 1.
      rows: indices of the rows that this process reads of each batch of B = `training.batch_size`
        examples, those that its devices hold (`BatchLayout.rows`); default all.
      ahead: how examples are requested before they are read; default not at all.

    Returns:
      A dataset whose elements are the examples' dicts with a leading axis of len(rows).
    """
    batch_size = config.training.batch_size
    rows = np.arange(batch_size) if rows is None else rows
    # grain's count of batches with a remainder would overflow for batches of one endless example.
    own = grain.MapDataset.source(_Rows(examples, rows, batch_size, ahead))
    batches = own.batch(len(rows), drop_remainder=True)
    prefetch = config.data.prefetch
    # Reading is mostly Python code, so several threads would wait for one another and be slower.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return batches.to_iter_dataset(options)


def epochs_read(config: RunConfig, sources: Sequence[Source]) -> dict[str, float]:
    """The number of times that `training.steps` steps read each source, by the source's name.

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
    """The mixture of sources with these numbers of examples; refuses what cannot be read."""
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
    """Yields every example once, in order, in batches of one shape.

    Args:
      examples: validation examples.
      batch_size: B; rows of zeros, whose weights are 0, fill the last batch.
      limit: number of examples to read, evenly spaced; None reads all.
      rows: indices of the rows to read of each batch, as in `batches_of`; default all.

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
