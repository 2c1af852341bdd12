"""Documents one after the other, as one long array of tokens of which any part can be read."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from plt_jax.data.tokens import TokenizedDocuments

Part = tuple[np.ndarray, np.ndarray]
"""Tokens, unsigned [n], and numbers of the documents that they belong to, int64 [n]: equal within a
document, and one more in the next."""


class TokenStream(Protocol):
    """Documents, each as bos + its text's tokens + eos."""

    def __len__(self) -> int:
        """Tokens in all."""

    def read(self, begin: int, length: int) -> Part:
        """The tokens from `begin` on, up to `length` of them: fewer at the end."""


class DocumentStream:
    """Documents at hand, in their order or in another."""

    def __init__(self, tokenized: TokenizedDocuments, shuffle_seed: int | None = None):
        """Lays documents out; no token is read yet.

        Args:
          tokenized: the documents.
          shuffle_seed: put them in an order drawn from this seed, so that a document meets other
            neighbours with another seed; None keeps their order.
        """
        self._tokens = tokenized.tokens
        lengths = np.diff(tokenized.starts, append=len(tokenized.tokens))
        order = np.arange(len(lengths))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        # Documents stay where they are in `tokens`, perhaps a file larger than memory; only the
        # places where they begin, in it and in the stream, are laid out.
        self._sources = tokenized.starts[order]
        self._ends = np.cumsum(lengths[order])
        self._starts = self._ends - lengths[order]

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, begin: int, length: int) -> Part:
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
    """Streams one after the other."""

    def __init__(self, lengths: Sequence[int], stream_at: Callable[[int], TokenStream]):
        """Lays streams out; none is opened yet.

        Args:
          lengths: tokens of each, none of them 0.
          stream_at: gives the stream of an index, whenever a part of it is read.
        """
        self._lengths, self._stream_at = lengths, stream_at
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, begin: int, length: int) -> Part:
        """See TokenStream."""
        tokens, documents, number = [], [], 0
        end = min(begin + length, len(self))
        while begin < end:
            index = int(np.searchsorted(self._ends, begin, side="right"))
            start = int(self._ends[index]) - self._lengths[index]
            part, numbers = self._stream_at(index).read(begin - start, end - begin)
            tokens.append(part)
            documents.append(numbers - numbers[0] + number)
            number = int(documents[-1][-1]) + 1
            begin += len(part)
        return np.concatenate(tokens), np.concatenate(documents)
