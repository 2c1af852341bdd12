"""Questions with one right answer, in which depth shows: how each task's are drawn, and answered.

A question is a prompt and its answer, in ASCII. Nothing but `random.Random.random` is drawn from,
whose numbers Python keeps the same in all versions.
"""

from __future__ import annotations

import itertools
import string
import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from plt_jax.config.data import QuestionsConfig
from plt_jax.errors import InputError

HELD_OUT = 8
"""One of so many questions is for tests and never trained on, by what it asks."""
TRIES = 20_000
"""Draws after which a question that has not come is taken not to exist."""
KNOWN = 1000
"""Draws in a row of known questions, after which there are taken to be no others."""


class Question(NamedTuple):
    """What a model is asked."""

    prompt: str
    answer: str


def p_hop(random: Random, hops: int, config: QuestionsConfig) -> Question:
    """Which letter is reached from the last one in `hops` hops, as `>>>abcabcd...`.

    A hop goes to the letter behind the latest earlier occurrence of the letter that it starts from:
    with one hop, what an induction head predicts (Sanford, Hsu and Telgarsky 2024). No letter comes
    twice in a row, or hops could stand still. Hops are marks, since the digit of a number of hops
    that was not trained on would say nothing to a model.
    """
    while True:
        letters = [_below(random, config.symbols)]
        for _ in range(config.length - 1):
            step = 1 + _below(random, config.symbols - 1)
            letters.append((letters[-1] + step) % config.symbols)
        reached = hop(letters, hops)
        if reached is not None:
            text = "".join(string.ascii_lowercase[letter] for letter in letters)
            return Question(">" * hops + text, text[reached])


def hop(letters: Sequence[int], hops: int) -> int | None:
    """The place that is reached from the last one; None where a hop finds no earlier occurrence."""
    place = len(letters) - 1
    for _ in range(hops):
        before = place - 1
        while before >= 0 and letters[before] != letters[place]:
            before -= 1
        if before < 0:
            return None
        place = before + 1
    return place


def addition(random: Random, digits: int, config: QuestionsConfig) -> Question:
    """The sum of two numbers of `digits` digits, as `57+68=`, written as people do.

    The first digit written may depend on carries from the very last.
    """
    one, other = (_number(random, digits) for _ in range(2))
    return Question(f"{one}+{other}=", str(one + other))


def summands(prompt: str) -> str:
    """Both numbers of a sum, in one order."""
    return "+".join(sorted(prompt.removesuffix("=").split("+")))


def dyck(random: Random, depth: int, config: QuestionsConfig) -> Question:
    """The brackets that close `depth` open ones, as `([]{=` is closed by `})`.

    The prompt is the beginning of a word of balanced brackets, of `config.length` brackets or one
    less: every bracket opens or closes at random where both can lead to that depth.
    """
    opening, closing = "([{<"[: config.symbols], ")]}>"[: config.symbols]
    length = config.length - (config.length - depth) % 2
    text, stack = [], []
    for left in range(length, 0, -1):
        must_open, must_close = depth - len(stack) == left, len(stack) - depth == left
        if must_open or not stack or (not must_close and random.random() < 0.5):
            kind = _below(random, config.symbols)
            stack.append(kind)
            text.append(opening[kind])
        else:
            text.append(closing[stack.pop()])
    return Question("".join(text) + "=", "".join(closing[kind] for kind in reversed(stack)))


def permutations(random: Random, swaps: int, config: QuestionsConfig) -> Question:
    """The order of items 1, 2, ... after swaps of two places each, as `acb=`.

    Letters name the pairs of places: with three items a is 1 and 2, b is 1 and 3, c is 2 and 3.
    Following them all is as hard as any state tracking from five items on (Liu et al. 2023).
    """
    pairs = list(itertools.combinations(range(config.symbols), 2))
    items = list(range(1, config.symbols + 1))
    text = ""
    for _ in range(swaps):
        index = _below(random, len(pairs))
        one, other = pairs[index]
        items[one], items[other] = items[other], items[one]
        text += string.ascii_letters[index]
    return Question(f"{text}=", "".join(map(str, items)))


def _number(random: Random, digits: int) -> int:
    """A number of so many digits, the first of which is 0 only if it is the only one."""
    first = _below(random, 10) if digits == 1 else 1 + _below(random, 9)
    return int("".join(map(str, [first, *(_below(random, 10) for _ in range(digits - 1))])))


def _below(random: Random, count: int) -> int:
    """A number from 0 to below `count`, a small one."""
    return int(random.random() * count)


class Task(NamedTuple):
    """A kind of questions."""

    make: Callable[[Random, int, QuestionsConfig], Question]
    """Draws one of a difficulty."""
    length: Callable[[int, QuestionsConfig], int]
    """Letters of the longest prompt of a difficulty with its answer."""
    asks: Callable[[str], str] = str
    """What a prompt asks: the same for prompts that ask the same."""


TASKS = {
    "p_hop": Task(p_hop, lambda hops, config: hops + config.length + 1),
    "addition": Task(addition, lambda digits, config: 3 * digits + 3, asks=summands),
    "dyck": Task(dyck, lambda depth, config: config.length + 1 + depth),
    "permutations": Task(permutations, lambda swaps, config: swaps + 1 + config.symbols),
}


def is_held_out(task: str, question: Question) -> bool:
    """Whether a question is for tests, whatever the run's seed."""
    return zlib.crc32(TASKS[task].asks(question.prompt).encode()) % HELD_OUT == 0


def draw(
    config: QuestionsConfig, random: Random, difficulties: Sequence[int], held_out: bool
) -> Iterator[Question]:
    """Endless questions, of difficulties in equal parts.

    Args:
      held_out: those for tests, or those for training.

    Raises:
      InputError: there are none.
    """
    make = TASKS[config.task].make
    while True:
        difficulty = difficulties[_below(random, len(difficulties))]
        for _ in range(TRIES):
            question = make(random, difficulty, config)
            if is_held_out(config.task, question) == held_out:
                break
        else:
            purpose = "tests" if held_out else "training"
            raise InputError(
                f"{config.task} of difficulty {difficulty} has no question for {purpose}, there "
                "are so few; drop that difficulty (data.questions)"
            )
        yield question


def exam(config: QuestionsConfig, difficulty: int, count: int) -> list[Question]:
    """`count` different held-out questions, or those that are found where there are fewer; the same
    for every run of such a task.

    Raises:
      InputError: there are none.
    """
    found: dict[str, Question] = {}
    known = 0
    for question in draw(config, Random(f"test {difficulty}"), [difficulty], held_out=True):
        known = known + 1 if question.prompt in found else 0
        found[question.prompt] = question
        if len(found) == count or known == KNOWN:
            return list(found.values())
