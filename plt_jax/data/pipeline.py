"""Batches of packed examples, for training and for evaluation."""

from collections.abc import Iterator

import grain
import jax
import numpy as np

from plt_jax.config import RunConfig
from plt_jax.data.packing import Example, PackedExamples
from plt_jax.data.tokens import TokenizedDocuments
from plt_jax.errors import InputError


def training_dataset(
    config: RunConfig,
    tokenized: TokenizedDocuments,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.IterDataset:
    """Endless training batches, shuffled anew in every epoch, the same for the same seed.

    Of B = `training.batch_size` examples each process gets the B/P that its devices hold: process
    p the rows p·B/P to (p+1)·B/P of the global batch. The iterator's whole state, `get_state()`,
    is the number of batches taken, so it resumes exactly, and with any number of processes.

    Args:
      config: seed, data and training are read.
      tokenized: the training documents.
      process_index: p, this process; default jax.process_index().
      process_count: P, all processes; default jax.process_count().

    Returns:
      A dataset whose elements are PackedExamples' dicts with a leading axis of B/P.

    Raises:
      InputError: B is not divisible by P, or the text makes fewer than B examples.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    batch_size = config.training.batch_size
    if batch_size % count:
        raise InputError(
            f"training.batch_size {batch_size} is not divisible by the {count} processes; "
            f"set it to a multiple of {count}"
        )
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
    # Every P-th small batch from the p-th on: the P processes' b-th ones are the b-th global batch.
    # (Without a remainder, whose count overflows for batches of one of endless examples.)
    batches = shuffled.batch(batch_size // count, drop_remainder=True)[index::count]
    prefetch = config.data.prefetch
    # Reading is mostly Python: more threads than one wait for one another, and are slower.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return batches.to_iter_dataset(options)


def evaluation_batches(
    examples: PackedExamples, batch_size: int, limit: int | None = None
) -> Iterator[Example]:
    """Every example once, in order, in batches of one shape.

    Args:
      examples: validation examples.
      batch_size: B; the last batch is filled up with rows of zeros, whose weights are 0.
      limit: read only this many examples, evenly spaced; None reads all.

    Yields:
      PackedExamples' dicts with a leading axis of B.
    """
    total = len(examples)
    count = total if limit is None else min(limit, total)
    indices = np.arange(count) * total // count
    for first in range(0, count, batch_size):
        rows = [examples[index] for index in indices[first : first + batch_size]]
        missing = batch_size - len(rows)
        rows += [{name: np.zeros_like(values) for name, values in rows[0].items()}] * missing
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
