"""Synthetic tasks that need depth: how each task draws its problems, and the test sets.

A problem is a prompt and its one right answer, both in ASCII. Problems are drawn with
`random.Random.random` alone, whose numbers are the same in all versions of Python.
"""

from __future__ import annotations

import itertools
import string
import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from plt_jax.config.data import SyntheticConfig
from plt_jax.errors import InputError

HELD_OUT = 8
"""One problem in HELD_OUT is held out: it is in no training example."""
MAX_TRIES = 20_000
"""Draws after which a difficulty is taken to have no problem of the wanted kind."""
MAX_REPEATS = 1000
"""Consecutive draws of known problems after which a test set is taken to be complete."""


class Problem(NamedTuple):
    """A prompt and the answer that a model must write after it."""

    prompt: str
    answer: str


def p_hop(random: Random, hops: int, config: SyntheticConfig) -> Problem:
    """Asks which letter is reached from the last one in `hops` hops, as `>>>abcabcd...`.

    A hop goes to the letter after the latest earlier occurrence of the letter that it starts from:
    one hop is the prediction of an induction head (Sanford, Hsu and Telgarsky 2024). Neighbouring
    letters differ, because a hop could otherwise stay where it is. The number of hops is written as
    that many `>`, because a digit that training never showed would say nothing to a model.
    """
    symbols = kinds_of_symbols(config)
    while True:
        letters = [_below(random, symbols)]
        for _ in range(config.length - 1):
            step = 1 + _below(random, symbols - 1)
            letters.append((letters[-1] + step) % symbols)
        reached = follow_hops(letters, hops)
        if reached is not None:
            text = "".join(string.ascii_lowercase[letter] for letter in letters)
            return Problem(">" * hops + text, text[reached])


def follow_hops(letters: Sequence[int], hops: int) -> int | None:
    """Returns the index that `hops` hops reach from the last letter, or None where a hop finds no
    earlier occurrence of its letter."""
    place = len(letters) - 1
    for _ in range(hops):
        before = place - 1
        while before >= 0 and letters[before] != letters[place]:
            before -= 1
        if before < 0:
            return None
        place = before + 1
    return place


def addition(random: Random, digits: int, config: SyntheticConfig) -> Problem:
    """Asks for the sum of two numbers of `digits` digits each, as `57+68=`.

    The answer begins with its highest digit, as people write it, so the first digit that a model
    writes may depend on carries from the very last ones.
    """
    one, other = (_number(random, digits) for _ in range(2))
    return Problem(f"{one}+{other}=", str(one + other))


def sort_summands(prompt: str) -> str:
    """The two summands of a prompt in one order, so that 1+2 and 2+1 are the same problem."""
    return "+".join(sorted(prompt.removesuffix("=").split("+")))


def dyck(random: Random, depth: int, config: SyntheticConfig) -> Problem:
    """Asks for the brackets that close `depth` open ones, as `([]{=` is closed by `})`.

    The prompt is a prefix of a balanced string, `config.length` brackets long or one fewer. Each
    bracket opens or closes at random wherever both can still lead to the depth.
    """
    symbols = kinds_of_symbols(config)
    opening, closing = "([{<"[:symbols], ")]}>"[:symbols]
    length = config.length - (config.length - depth) % 2
    text, stack = [], []
    for left in range(length, 0, -1):
        must_open, must_close = depth - len(stack) == left, len(stack) - depth == left
        if must_open or not stack or (not must_close and random.random() < 0.5):
            kind = _below(random, symbols)
            stack.append(kind)
            text.append(opening[kind])
        else:
            text.append(closing[stack.pop()])
    return Problem("".join(text) + "=", "".join(closing[kind] for kind in reversed(stack)))


def permutations(random: Random, swaps: int, config: SyntheticConfig) -> Problem:
    """Asks for the order of the items 1, 2, ... after `swaps` swaps of two places, as `acb=`.

    A letter names a pair of places: with three items, a is 1 and 2, b is 1 and 3, c is 2 and 3.
    From five items on, the task is as hard as any state tracking (Liu et al. 2023).
    """
    symbols = kinds_of_symbols(config)
    pairs = list(itertools.combinations(range(symbols), 2))
    items = list(range(1, symbols + 1))
    text = ""
    for _ in range(swaps):
        index = _below(random, len(pairs))
        one, other = pairs[index]
        items[one], items[other] = items[other], items[one]
        text += string.ascii_letters[index]
    return Problem(f"{text}=", "".join(map(str, items)))


def kinds_of_symbols(config: SyntheticConfig) -> int:
    """The number of kinds of symbols, which the configuration resolves for tasks that have it."""
    assert config.symbols is not None
    return config.symbols


def _number(random: Random, digits: int) -> int:
    """Draws a number of `digits` digits; only a number of one digit may begin with 0."""
    first = _below(random, 10) if digits == 1 else 1 + _below(random, 9)
    return int("".join(map(str, [first, *(_below(random, 10) for _ in range(digits - 1))])))


def _below(random: Random, count: int) -> int:
    """Draws an integer from 0 to count - 1, for a small count."""
    return int(random.random() * count)


class Task(NamedTuple):
    """How the problems of one synthetic task are drawn, measured and compared."""

    make: Callable[[Random, int, SyntheticConfig], Problem]
    """Draws a problem of a difficulty."""
    length: Callable[[int, SyntheticConfig], int]
    """Characters of the longest prompt of a difficulty, together with its answer."""
    canonical: Callable[[str], str] = str
    """Maps a prompt to a form that is equal for all prompts of the same problem."""


TASKS = {
    "p_hop": Task(p_hop, lambda hops, config: hops + config.length + 1),
    "addition": Task(addition, lambda digits, config: 3 * digits + 3, canonical=sort_summands),
    "dyck": Task(dyck, lambda depth, config: config.length + 1 + depth),
    "permutations": Task(permutations, lambda swaps, config: swaps + 1 + kinds_of_symbols(config)),
}


def is_held_out(task: str, problem: Problem) -> bool:
    """Whether a problem is reserved for validation and test sets, in runs of any seed."""
    return zlib.crc32(TASKS[task].canonical(problem.prompt).encode()) % HELD_OUT == 0


def draw_problems(
    config: SyntheticConfig, random: Random, difficulties: Sequence[int], held_out: bool
) -> Iterator[Problem]:
    """Yields problems without end, equally many of each difficulty on average.

    Args:
      held_out: whether to draw held-out problems or those to train on.

    Raises:
      InputError: a difficulty has no such problem.
    """
    make = TASKS[config.task].make
    while True:
        difficulty = difficulties[_below(random, len(difficulties))]
        for _ in range(MAX_TRIES):
            problem = make(random, difficulty, config)
            if is_held_out(config.task, problem) == held_out:
                break
        else:
            purpose = "tests" if held_out else "training"
            raise InputError(
                f"{config.task} of difficulty {difficulty} has too few problems: none is left for "
                f"{purpose}; drop that difficulty (data.synthetic)"
            )
        yield problem


def make_test_set(config: SyntheticConfig, difficulty: int, count: int) -> list[Problem]:
    """Returns `count` different held-out problems, or all that are found where there are fewer.

    The test set of a task and difficulty is the same for every run.

    Raises:
      InputError: the difficulty has no held-out problem.
    """
    found: dict[str, Problem] = {}
    repeats = 0
    random = Random(f"test {difficulty}")
    for problem in draw_problems(config, random, [difficulty], held_out=True):
        repeats = repeats + 1 if problem.prompt in found else 0
        found[problem.prompt] = problem
        if len(found) == count or repeats == MAX_REPEATS:
            break
    return list(found.values())
