"""Packs documents into examples of one length, addressable by index."""

import operator
from typing import Protocol, SupportsIndex

import numpy as np

from plt_jax.data.streams import TokenStream

Example = dict[str, np.ndarray]
"""Arrays tokens, targets, segment_ids (int32) and weights (float32): [T], or [B, T] in a batch."""


class Examples(Protocol):
    """A sequence of examples of one length T."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Example: ...


class PackedExamples:
    """Documents concatenated, then split every T tokens: a random-access source for grain.

    Inputs of example i are the tokens i·T to (i+1)·T - 1, and targets the tokens one to the right:

      tokens       int32 [T]    0 where padded
      targets      int32 [T]    0 where padded
      segment_ids  int32 [T]    1, 2, ... by document within the example; 0 where padded
      weights      float32 [T]  1 where the target belongs to the input's document, else 0

    So each token except a document's bos is predicted once over all examples, and never from the
    last token of another document.

    An example depends on its index alone. A reader's only state is therefore one integer, how many
    examples have been read, and it is the same for any number of processes that share the reading.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        *,
        drop_incomplete: bool = False,
    ):
        """Packs documents, without reading a token.

        Args:
          stream: the documents, one after the other.
          sequence_length: T.
          drop_incomplete: whether to leave out the last example if it would need padding.
        """
        self._stream = stream
        self._length = sequence_length
        # The last token of the stream is a target but never an input.
        inputs = max(len(stream) - 1, 0)
        self._count = inputs // self._length if drop_incomplete else -(-inputs // self._length)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"PackedExamples({self._count} examples of {self._length} tokens)"

    def span(self, index: int) -> tuple[int, int]:
        """The first token of the stream that an example is made from, and the number of tokens."""
        return index * self._length, self._length + 1

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = operator.index(index)
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        tokens, documents = self._stream.read(*self.span(index))
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

    def _pad(self, values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        padded = np.zeros(self._length, dtype)
        padded[: len(values)] = values
        return padded
