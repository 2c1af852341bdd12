"""The device's part of serving: a model with a fixed number of sequence slots.

Every slot is a row of one cache. A request joins a free row, its prompt is prefilled in chunks, and
it leaves the row at any step. All programs are compiled before the first request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import init_cache
from plt_jax.decoding.sampling import RowSampling
from plt_jax.decoding.weights import DecodeWeights
from plt_jax.distributed.mesh import use_mesh
from plt_jax.serving import slot_programs
from plt_jax.serving.prefix_cache import NO_TOKENS
from plt_jax.serving.request import SlotSampling
from plt_jax.serving.slot_programs import Block, Drawn, Scores

MOST_BIASES = 300
"""Tokens whose logits a request may change."""
SMALLEST_CHUNK = 16
"""Tokens of the smallest chunk that a prefill program is compiled for."""

LEAST_READ = 256
"""The smallest number of positions that a step reads, at least."""

_SCALARS = {"top_k_B": np.int32}
"""The dtypes of RowSampling's fields that are not float32."""


class SlotModel:
    """A model and its slots; each method enqueues one program and does not wait for it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecodeWeights,
        slots: int,
        context: int,
        chunk: int,
        cache_dtype: str | None = None,
        mesh: Mesh | None = None,
    ):
        """Makes the state of empty slots.

        Args:
          slots: their number, B.
          context: tokens that fit into each.
          chunk: tokens of the largest chunk of a prefill, and of a block of `save_block`.
          cache_dtype: see `init_cache`.
          mesh: the mesh over which the weights lie; default one device. Only its tensor axis may
            have several devices, since most programs work on single rows of the cache.

        Raises:
          InputError: see `init_cache`.
        """
        self.config, self._weights, self.slots, self.chunk = config, weights, slots, chunk
        self.context, self._mesh = context, mesh
        with use_mesh(self._mesh):
            self._state = slot_programs.empty_state(config, slots, context, cache_dtype)

    @property
    def chunks(self) -> list[int]:
        """The sizes of chunks that there are programs for, the largest last."""
        sizes = [self.chunk]
        while sizes[-1] // 4 >= SMALLEST_CHUNK:
            sizes.append(sizes[-1] // 4)
        return sizes[::-1]

    @property
    def reads(self) -> list[int]:
        """The numbers of positions whose keys a decode step reads; there is a program for each."""
        sizes = [self.context]
        while sizes[-1] // 4 >= LEAST_READ:
            sizes.append(-(-sizes[-1] // 4))
        return sizes[::-1]

    def padded(self, count: int) -> int:
        """The tokens of the chunk that a prefill of `count` tokens is computed as."""
        return next(size for size in self.chunks if size >= count)

    def compile(self) -> None:
        """Compiles every program by running it on an empty slot."""
        for _ in range(2):  # the second time on a state that lies where the programs leave it
            self.start(0, SlotSampling(), [0])
            for size in self.chunks:
                self.prefill(0, [0] * size, is_last=True)
                self.prefill(0, [0] * size, is_last=True, following=[0] * size)
            self.load_block(0, 0, self.save_block(0, 0))
            for size in self.reads:
                drawn = self.step(np.zeros(self.slots, bool), False, size)
        jax.block_until_ready(drawn)

    def start(self, slot: int, sampling: SlotSampling, prompt: Sequence[int]) -> None:
        """Empties a slot for a new request.

        Args:
          prompt: all of its tokens, which `prefill` or `load_block` bring into the cache.
        """
        vocab = self.config.vocab_size
        prompt_S = np.full(self.context, vocab, np.int32)
        prompt_S[: len(prompt)] = prompt
        biased = np.full(MOST_BIASES, vocab, np.int32)
        biases = np.zeros(MOST_BIASES, np.float32)
        biased[: len(sampling.logit_bias)] = list(sampling.logit_bias)
        biases[: len(sampling.logit_bias)] = list(sampling.logit_bias.values())
        names = [field.name for field in dataclasses.fields(RowSampling)]
        row = {name: getattr(sampling, name.removesuffix("_B")) for name in names}
        # In the state's dtypes: a whole number as a temperature would be another program.
        row = {name: _SCALARS.get(name, np.float32)(value) for name, value in row.items()}
        loops = np.int32(sampling.loops or self.config.loop.count)
        seed, choice = np.uint32(sampling.seed), np.uint32(sampling.choice)
        with use_mesh(self._mesh):
            self._state = slot_programs.start(
                self._state, np.int32(slot), row, loops, seed, choice, prompt_S, biased, biases
            )

    def beginning(self, sampling: SlotSampling) -> bytes:
        """The prefix cache's key of the empty beginning, for requests whose blocks are alike.

        What layers behind the loops keep of a token depends on the number of loops.
        """
        loops = sampling.loops or self.config.loop.count
        return loops.to_bytes(2, "big") if self.config.has_coda else NO_TOKENS

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        is_last: bool,
        following: Sequence[int] | None = None,
    ) -> tuple[Drawn, Scores | None]:
        """Appends a chunk of a prompt to a slot.

        Args:
          tokens: at most `chunk`.
          is_last: whether the prompt ends here; then the slot's first new token is drawn.
          following: the tokens behind each of `tokens`, if they are to be scored; behind the
            prompt's last one any.

        Returns:
          What was drawn, [1], and the scores of `following`, [C] with C at least the number of
          tokens.
        """
        size = self.padded(len(tokens))
        arguments = (
            np.int32(slot),
            _padded(tokens, size),
            np.int32(len(tokens)),
            np.bool_(is_last),
        )
        with use_mesh(self._mesh):
            if following is None:
                self._state, drawn = slot_programs.prefill(
                    self.config, self._weights, self._state, *arguments
                )
                return drawn, None
            self._state, drawn, scores = slot_programs.prefill_scored(
                self.config, self._weights, self._state, *arguments, _padded(following, size)
            )
            return drawn, scores

    def step(self, active_B: np.ndarray, log_probabilities: bool, longest: int) -> Drawn:
        """Appends each active slot's newest token and draws the next one, [B]; others are junk.

        Args:
          longest: tokens in the fullest active slot, with the newest one.
        """
        size = next(size for size in self.reads if size >= longest)
        with use_mesh(self._mesh):
            self._state, drawn = slot_programs.step(
                self.config, size, self._weights, self._state, active_B, np.bool_(log_probabilities)
            )
        return drawn

    def save_block(self, slot: int, start: int) -> Block:
        """A copy of what a slot holds of `chunk` tokens from position `start` on, with which it
        ends."""
        with use_mesh(self._mesh):
            return slot_programs.save_block(
                self.chunk, self._state.cache, np.int32(slot), np.int32(start)
            )

    def load_block(self, slot: int, start: int, block: Block) -> None:
        """Appends a block to a slot, which holds `start` tokens."""
        with use_mesh(self._mesh):
            self._state = slot_programs.load_block(
                self._state, np.int32(slot), np.int32(start), block
            )


def block_bytes(config: ModelConfig, chunk: int, cache_dtype: str | None = None) -> int:
    """The bytes of a `Block`."""

    def one() -> Block:
        cache = init_cache(config, 1, chunk + config.loop.window, cache_dtype)
        return slot_programs.save_block(chunk, cache, jnp.int32(0), jnp.int32(0))

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(one)))


def _padded(tokens: Sequence[int], size: int) -> np.ndarray:
    """Tokens as a row of a fixed size, int32 [1, size]."""
    row = np.zeros((1, size), np.int32)
    row[0, : len(tokens)] = tokens
    return row
