"""Problems of synthetic tasks packed into examples of one length, as packing.py packs text."""

from __future__ import annotations

import sys
from random import Random
from typing import SupportsIndex

import numpy as np

from plt_jax.config import RunConfig
from plt_jax.config.data import SyntheticConfig
from plt_jax.data.packing import Example
from plt_jax.data.synthetic_tasks import TASKS, Problem, draw_problems, make_test_set
from plt_jax.data.tokenizer import TextTokenizer, find_tokenizer, load_tokenizer
from plt_jax.data.tokenizer_training import SMALLEST_VOCABULARY, train_tokenizer
from plt_jax.errors import InputError, naming

VALIDATION_EXAMPLES = 64


class ProblemEncoder:
    """Encodes a problem as a document: bos, the bytes of prompt and answer as tokens, eos."""

    def __init__(self, tokenizer: TextTokenizer):
        vocabulary = tokenizer.library.get_vocab()
        self._ids = {chr(code): vocabulary[chr(code)] for code in range(33, 127)}
        self._begin, self.eos = tokenizer.encode_prompt(""), tokenizer.eos

    def prompt(self, problem: Problem) -> list[int]:
        """The tokens that the model is given, bos first."""
        return [*self._begin, *map(self._ids.__getitem__, problem.prompt)]

    def answer(self, problem: Problem) -> list[int]:
        """The tokens that the model must write, eos last."""
        return [*map(self._ids.__getitem__, problem.answer), self.eos]


class SyntheticExamples:
    """Examples of whole problems, addressable by index: a random-access source for grain.

    Each example holds problems one after the other, as long as a longest one still fits, and then
    padding. The arrays are those of `packing.PackedExamples`, with two differences: weights are 1
    only where the target belongs to an answer or is its eos, and no eos is an input, because
    nothing follows it. An example depends on the configuration and its index alone.
    """

    def __init__(self, config: RunConfig, tokenizer: TextTokenizer, *, held_out: bool):
        """
        Args:
          config: the run; its seed, data and model are read.
          tokenizer: `byte_tokenizer`'s.
          held_out: whether to make VALIDATION_EXAMPLES examples of held-out problems, which are the
            same for any seed, or sys.maxsize examples to train on.

        Raises:
          InputError: a difficulty has no such problem, or one that T tokens cannot hold.
        """
        self._task, self._length = config.data.synthetic, config.sequence_length
        self._held_out = held_out
        self._seed = "validation" if held_out else f"training {config.seed}"
        self._encoder = ProblemEncoder(tokenizer)
        difficulties = self._task.difficulties
        for difficulty in difficulties:
            tokens = longest_input(self._task, difficulty)
            check_length(self._task, difficulty, tokens, "data.sequence_length", self._length)
            next(draw_problems(self._task, Random(0), [difficulty], held_out))
        self._longest = max(longest_input(self._task, difficulty) for difficulty in difficulties)
        self._made: list[Example] = []
        if held_out:
            self._made = [self._make(index) for index in range(VALIDATION_EXAMPLES)]

    def __len__(self) -> int:
        return VALIDATION_EXAMPLES if self._held_out else sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = range(len(self))[index]
        return self._made[index] if self._held_out else self._make(index)

    def _make(self, index: int) -> Example:
        random = Random(f"{self._seed} {index}")
        # Appending a few numbers at a time is faster for lists than for arrays.
        tokens, targets, segment_ids, weights = [], [], [], []
        problems = draw_problems(self._task, random, self._task.difficulties, self._held_out)
        # Drawing only where any problem fits keeps long problems as frequent as short ones.
        while len(tokens) + self._longest <= self._length:
            problem, number = next(problems), 1 + (segment_ids[-1] if segment_ids else 0)
            prompt, answer = self._encoder.prompt(problem), self._encoder.answer(problem)
            tokens += prompt + answer[:-1]
            targets += prompt[1:] + answer
            segment_ids += [number] * (len(prompt) + len(answer) - 1)
            weights += [0] * (len(prompt) - 1) + [1] * len(answer)
        padding = [0] * (self._length - len(tokens))
        return {
            "tokens": np.array(tokens + padding, np.int32),
            "targets": np.array(targets + padding, np.int32),
            "segment_ids": np.array(segment_ids + padding, np.int32),
            "weights": np.array(weights + padding, np.float32),
        }


def byte_tokenizer(config: RunConfig) -> TextTokenizer:
    """The tokenizer of synthetic tasks, which has 256 bytes and the two special tokens.

    Raises:
      InputError: tokenizer.path names another tokenizer, or model.vocab_size is too small.
    """
    tokenizer = train_tokenizer([], config.model.vocab_size, min_frequency=1)
    if config.tokenizer.path is not None:
        with naming("tokenizer.path"):
            named = load_tokenizer(find_tokenizer(config.tokenizer.path))
            if named.identity != tokenizer.identity:
                raise InputError(
                    f"{config.tokenizer.path} is not the tokenizer of synthetic tasks, which has "
                    f"{SMALLEST_VOCABULARY} tokens, one for each byte and two special ones; drop "
                    "tokenizer.path, or start from a run that has this tokenizer"
                )
    return tokenizer


def check_test_set(config: SyntheticConfig, max_length: int) -> None:
    """Raises InputError where a test difficulty has no problem, or one that a context of
    `max_length` tokens cannot hold."""
    for difficulty in config.test_difficulties:
        tokens = longest_input(config, difficulty) + 1  # decoding writes the eos into the context
        check_length(config, difficulty, tokens, "model.max_length", max_length)
        make_test_set(config, difficulty, 1)


def longest_input(config: SyntheticConfig, difficulty: int) -> int:
    """Tokens of the longest problem of a difficulty, without its eos, which is never an input."""
    return 1 + TASKS[config.task].length(difficulty, config)


def check_length(
    config: SyntheticConfig, difficulty: int, tokens: int, limit_name: str, limit: int
) -> None:
    """Raises InputError where a difficulty's longest problem takes more tokens than the limit."""
    if tokens > limit:
        raise InputError(
            f"a problem of {config.task} of difficulty {difficulty} takes up to {tokens} tokens, "
            f"more than {limit_name} {limit}; raise that, or drop the difficulty (data.synthetic)"
        )
