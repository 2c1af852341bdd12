"""Questions packed into examples of one length, addressable by index, as packing.py packs text."""

from __future__ import annotations

import sys
from random import Random
from typing import SupportsIndex

import numpy as np
from tokenizers import Tokenizer

from plt_jax.config import RunConfig
from plt_jax.config.data import QuestionsConfig
from plt_jax.data.packing import Example
from plt_jax.data.synthetic_tasks import TASKS, Question, draw, exam
from plt_jax.data.tokenizer import (
    SMALLEST_VOCABULARY,
    bos_id,
    eos_id,
    load_tokenizer,
    train_tokenizer,
)
from plt_jax.errors import InputError, naming

VALIDATION_EXAMPLES = 64


class QuestionEncoder:
    """Questions as the tokens of a document: bos, the prompt's and the answer's bytes, eos."""

    def __init__(self, tokenizer: Tokenizer):
        self._ids = {chr(code): tokenizer.token_to_id(chr(code)) for code in range(33, 127)}
        self._bos, self.eos = bos_id(tokenizer), eos_id(tokenizer)

    def prompt(self, question: Question) -> list[int]:
        """What the model is given."""
        return [self._bos, *map(self._ids.__getitem__, question.prompt)]

    def answer(self, question: Question) -> list[int]:
        """What it must then say."""
        return [*map(self._ids.__getitem__, question.answer), self.eos]


class QuestionExamples:
    """Whole questions one after the other, as long as the longest still fits; then padding.

    Arrays are as `packing.PackedExamples` has them, but that weights are 1 on targets of answers
    and their eos alone, and that no eos is an input, since nothing follows it. An example depends
    on the configuration and its index alone.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, *, held_out: bool):
        """
        Args:
          config: its seed, data and model are read.
          held_out: held-out questions, the same for any seed, VALIDATION_EXAMPLES of examples; else
            endless ones to train on.

        Raises:
          InputError: a difficulty has no such question, or one that T tokens do not hold.
        """
        self._questions, self._length = config.data.questions, config.sequence_length
        self._held_out = held_out
        self._seed = "validation" if held_out else f"training {config.seed}"
        self._encoder = QuestionEncoder(tokenizer)
        difficulties = self._questions.difficulties
        for difficulty in difficulties:
            tokens = inputs_of(self._questions, difficulty)
            check_length(self._questions, difficulty, tokens, "data.sequence_length", self._length)
            next(draw(self._questions, Random(0), [difficulty], held_out))
        self._longest = max(inputs_of(self._questions, difficulty) for difficulty in difficulties)
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
        # Lists are faster to add a few numbers to than arrays.
        tokens, targets, segment_ids, weights = [], [], [], []
        drawn = draw(self._questions, random, self._questions.difficulties, self._held_out)
        # One that might not fit is not drawn at all: long ones would be rarer than short ones.
        while len(tokens) + self._longest <= self._length:
            question, number = next(drawn), 1 + (segment_ids[-1] if segment_ids else 0)
            prompt, answer = self._encoder.prompt(question), self._encoder.answer(question)
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


def question_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of questions: bytes, and the two special tokens.

    Raises:
      InputError: the run names another (tokenizer.path), or model.vocab_size does not hold it.
    """
    tokenizer = train_tokenizer([], config.model.vocab_size, min_frequency=1)
    if config.tokenizer.path is not None:
        with naming("tokenizer.path"):
            if load_tokenizer(config.tokenizer.path).to_str() != tokenizer.to_str():
                raise InputError(
                    f"{config.tokenizer.path} is not the tokenizer of questions, which is of bytes "
                    f"and has {SMALLEST_VOCABULARY} tokens; drop it, or a start_from that has it"
                )
    return tokenizer


def check_exam(config: QuestionsConfig, max_length: int) -> None:
    """Raises InputError where a test's difficulty has no question, or one that a context of
    `max_length` tokens does not hold."""
    for difficulty in config.test_difficulties:
        tokens = inputs_of(config, difficulty) + 1  # the eos, too, takes a place when it is written
        check_length(config, difficulty, tokens, "model.max_length", max_length)
        exam(config, difficulty, 1)


def inputs_of(config: QuestionsConfig, difficulty: int) -> int:
    """Tokens of the longest question of a difficulty without its eos, which is no input."""
    return 1 + TASKS[config.task].length(difficulty, config)


def check_length(
    config: QuestionsConfig, difficulty: int, tokens: int, limit_name: str, limit: int
) -> None:
    """Raises InputError where a question of a difficulty takes more tokens than a limit."""
    if tokens > limit:
        raise InputError(
            f"a question of {config.task} of difficulty {difficulty} takes up to {tokens} tokens, "
            f"more than {limit_name} {limit}; raise that, or drop the difficulty (data.questions)"
        )
