"""Documents packed into examples of one length, addressable by index."""

import operator
from typing import SupportsIndex

import numpy as np

from plt_jax.data.tokens import TokenizedDocuments

Example = dict[str, np.ndarray]
"""tokens, targets and segment_ids, int32, and weights, float32; [T], or [B, T] in a batch."""


class PackedExamples:
    """Documents concatenated, then split every T tokens: a random-access source for grain.

    Example i has tokens i·T to (i+1)·T as inputs, and as targets the tokens one to the right:

      tokens       int32 [T]    0 where padded
      targets      int32 [T]    0 where padded
      segment_ids  int32 [T]    1, 2, ... by document within the example; 0 where padded
      weights      float32 [T]  1 where the target belongs to the input's document, else 0

    So every token but each document's bos is predicted once over all examples, and never from
    another document's last token.

    An example depends on its index alone, so a reader's only state is one integer, how far it has
    come, and that holds for any number of processes that share the work.
    """

    def __init__(
        self,
        tokenized: TokenizedDocuments,
        sequence_length: int,
        *,
        shuffle_seed: int | None = None,
        drop_incomplete: bool = False,
    ):
        """Packs documents; no token is read yet.

        Args:
          tokenized: the documents.
          sequence_length: T.
          shuffle_seed: put the documents in an order drawn from this seed first, so that a document
            meets other neighbours with another seed; None keeps their order.
          drop_incomplete: leave out the last example if padding would have to fill it.
        """
        self._tokens = tokenized.tokens
        self._length = sequence_length
        lengths = np.diff(tokenized.starts, append=len(tokenized.tokens))
        order = np.arange(len(lengths))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        # Documents stay where they are in `tokens`, perhaps a file larger than memory; only the
        # places where they begin, in it and in the concatenation, are laid out.
        self._sources = tokenized.starts[order]
        self._ends = np.cumsum(lengths[order])
        self._starts = self._ends - lengths[order]
        # The last token is a target but never an input.
        inputs = len(tokenized.tokens) - 1
        self._count = inputs // self._length if drop_incomplete else -(-inputs // self._length)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"PackedExamples({self._count} examples of {self._length} tokens)"

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = operator.index(index)
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        tokens, documents = self._read(index * self._length, self._length + 1)
        targets = tokens[1:]
        same_document = documents[1:] == documents[:-1]
        example = {
            "tokens": tokens[:-1],
            "targets": targets,
            "segment_ids": documents[:-1] - documents[0] + 1,
            "weights": same_document,
        }
        dtypes = {"weights": np.float32}
        return {
            name: self._pad(values, dtypes.get(name, np.int32)) for name, values in example.items()
        }

    def _read(self, begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `length` tokens of the concatenation, and the document that each belongs to."""
        end = min(begin + length, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        documents = np.arange(first, last + 1)
        starts = np.maximum(self._starts[documents], begin)
        lengths = np.minimum(self._ends[documents], end) - starts
        sources = self._sources[documents] + starts - self._starts[documents]
        pieces = [
            self._tokens[source : source + count]
            for source, count in zip(sources, lengths, strict=True)
        ]
        return np.concatenate(pieces), np.repeat(documents, lengths)

    def _pad(self, values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        padded = np.zeros(self._length, dtype)
        padded[: len(values)] = values
        return padded
