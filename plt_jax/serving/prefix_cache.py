"""A cache of prompts' beginnings: requests that begin alike prefill what differs.

A prompt's blocks of a fixed number of tokens are kept as the device's cache holds them, each with
what goes on behind it, so that a request may go on behind any of them. A block is known by a digest
of all tokens up to its end, so it is what a prefill of them left.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Block = TypeVar("Block")

NO_TOKENS = b""
"""The key of the empty beginning, if there is one only."""
DIGEST_BYTES = hashlib.sha256().digest_size


def key_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block of `tokens` that follows the block with the key `before`."""
    return hashlib.sha256(before + np.asarray(tokens, np.int32).tobytes()).digest()


class _Kept(NamedTuple, Generic[Block]):
    before: bytes
    """The key of the block before this one."""
    block: Block


class PrefixCache(Generic[Block]):
    """Blocks of prompts, of which those that were used last stay."""

    def __init__(self, block_tokens: int, block_bytes: int, most_bytes: int):
        """Makes an empty cache.

        Args:
          block_tokens: tokens of a block.
          block_bytes: bytes of a block.
          most_bytes: bytes that all blocks may have together; 0 keeps none.
        """
        self.block_tokens, self._block_bytes = block_tokens, block_bytes
        self._most = most_bytes // block_bytes
        self._kept: OrderedDict[bytes, _Kept[Block]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """The bytes of all blocks."""
        return len(self._kept) * self._block_bytes

    def find(self, prompt: Sequence[int], key: bytes = NO_TOKENS) -> list[tuple[bytes, Block]]:
        """The blocks that a prompt begins with, in order, each with its key.

        At least one token is left, which a request needs for its first logits.

        Args:
          key: that of the empty beginning; see `Slots.beginning`.
        """
        found = []
        for start in range(0, len(prompt) - self.block_tokens, self.block_tokens):
            key = key_of(key, prompt[start : start + self.block_tokens])
            if key not in self._kept:
                break
            found.append((key, self._kept[key].block))
        if found:
            self._touch(found[-1][0])
        return found

    def needs(self, before: bytes, key: bytes) -> bool:
        """Whether a block is to be added: it is not there, but those before it are.

        Args:
          before, key: see `add`.
        """
        is_reachable = len(before) < DIGEST_BYTES or before in self._kept
        return self._most > 0 and key not in self._kept and is_reachable

    def add(self, before: bytes, key: bytes, block: Block) -> None:
        """Keeps a block, and drops those whose last use is longest ago if there are too many.

        Args:
          before: the key of the block before it, of the empty beginning for the first one.
        """
        self._kept[key] = _Kept(before, block)
        self._touch(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _touch(self, key: bytes) -> None:
        """Makes a block the newest, and those before it newer, which it is of no use without."""
        while key in self._kept:
            self._kept.move_to_end(key)
            key = self._kept[key].before
