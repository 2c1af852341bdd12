"""Token streams: documents one after the other, of which any span of tokens can be read."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from plt_jax.data.tokens import TokenizedDocuments

TokenSpan = tuple[np.ndarray, np.ndarray]
"""Tokens, unsigned [n], and the number of each token's document, int64 [n]: the numbers are equal
within a document, and larger by one in the next document. Only their differences have a meaning."""


class TokenStream(Protocol):
    """Documents in a fixed order, each as bos + its text's tokens + eos."""

    def __len__(self) -> int:
        """Number of tokens of all documents."""
        ...

    def read(self, begin: int, length: int) -> TokenSpan:
        """Reads `length` tokens from `begin` on, or as many as there are up to the end."""
        ...


class DocumentStream:
    """A stream of documents in one array, in the array's order or shuffled."""

    def __init__(self, tokenized: TokenizedDocuments, shuffle_seed: int | None = None):
        """Decides the order of the documents, without reading a token.

        Args:
          tokenized: the documents.
          shuffle_seed: seed of a random order, so that another seed gives a document other
            neighbours; None keeps the documents' order.
        """
        self._tokens = tokenized.tokens
        lengths = np.diff(tokenized.starts, append=len(tokenized.tokens))
        order = np.arange(len(lengths))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        # The tokens stay where they are, perhaps in a file larger than memory. Memory holds only
        # where each document begins, in the array and in the stream.
        self._sources = tokenized.starts[order]
        self._ends = np.cumsum(lengths[order])
        self._starts = self._ends - lengths[order]

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, begin: int, length: int) -> TokenSpan:
        """See TokenStream."""
        end = min(begin + length, len(self))
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


class JoinedStream:
    """A stream of several streams, one after the other."""

    def __init__(self, lengths: Sequence[int], stream_at: Callable[[int], TokenStream]):
        """Joins streams, without opening one.

        Args:
          lengths: number of tokens of each stream, all above 0.
          stream_at: returns the stream of an index; it is called for each span that is read.
        """
        self._lengths, self._stream_at = lengths, stream_at
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def streams_in(self, begin: int, length: int) -> range:
        """The indices of the streams that `length` tokens from `begin` on lie in."""
        last = min(begin + length, len(self)) - 1
        first_stream, last_stream = np.searchsorted(self._ends, [begin, last], side="right")
        return range(int(first_stream), int(last_stream) + 1)

    def read(self, begin: int, length: int) -> TokenSpan:
        """See TokenStream."""
        tokens, documents, number = [], [], 0
        end = min(begin + length, len(self))
        while begin < end:
            index = int(np.searchsorted(self._ends, begin, side="right"))
            start = int(self._ends[index]) - self._lengths[index]
            span, numbers = self._stream_at(index).read(begin - start, end - begin)
            tokens.append(span)
            documents.append(numbers - numbers[0] + number)
            number = int(documents[-1][-1]) + 1
            begin += len(span)
        return np.concatenate(tokens), np.concatenate(documents)
