"""Problems against answers found in other ways: by search, by reduction, by matrices."""

import itertools
import re
from random import Random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from plt_jax.config.data import SyntheticConfig
from plt_jax.data.synthetic_tasks import (
    TASKS,
    Problem,
    draw_problems,
    follow_hops,
    is_held_out,
    make_test_set,
)
from plt_jax.errors import InputError

SEEDS = st.integers(0, 10**6)


def asked(task, difficulty, seed, **settings) -> Problem:
    config = SyntheticConfig(task=task, difficulties=[difficulty], **settings)
    return TASKS[task].make(Random(seed), difficulty, config)


@hypothesis.given(SEEDS, st.integers(1, 6), st.integers(3, 8))
def test_p_hop_follows_the_latest_earlier_occurrence(seed, hops, symbols):
    length = hops * symbols + 1 + seed % 9
    problem = asked("p_hop", hops, seed, length=length, symbols=symbols)
    text = problem.prompt.lstrip(">")
    assert problem.prompt == ">" * hops + text
    assert len(text) == length
    assert set(text) <= set("abcdefgh"[:symbols])
    assert not re.search(r"(.)\1", text)
    place = length - 1
    for _ in range(hops):
        place = text.rindex(text[place], 0, place) + 1
    assert problem.answer == text[place]


@hypothesis.given(SEEDS, st.sampled_from(list(TASKS)), st.integers(1, 12))
def test_no_problem_is_longer_than_its_task_says(seed, task, difficulty):
    config = SyntheticConfig(task=task, difficulties=[difficulty], length=49)
    problem = TASKS[task].make(Random(seed), difficulty, config)
    spare = TASKS[task].length(difficulty, config) - len(problem.prompt) - len(problem.answer)
    assert 0 <= spare <= 1


def test_hops_of_a_string_by_hand():
    letters = ["abcabdacd".index(letter) for letter in "abcabdacd"]  # a b c a b d a c d
    assert follow_hops(letters, 1) == 6  # the d before is followed by a,
    assert follow_hops(letters, 2) == 4  # the a before that by b,
    assert follow_hops(letters, 3) == 2  # the b before that by c,
    assert follow_hops(letters, 4) is None  # which has not come before


@hypothesis.given(SEEDS, st.integers(1, 30))
def test_addition_is_of_numbers_of_so_many_digits(seed, digits):
    problem = asked("addition", digits, seed)
    one, other = problem.prompt.removesuffix("=").split("+")
    assert len(one) == len(other) == digits
    assert digits == 1 or "0" not in (one[0], other[0])
    assert problem.answer == str(int(one) + int(other))


@hypothesis.given(SEEDS, st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_dyck_closes_what_is_open(seed, depth, symbols, more):
    problem = asked("dyck", depth, seed, length=depth + more, symbols=symbols)
    text = problem.prompt.removesuffix("=")
    assert len(text) == depth + more - more % 2
    assert len(problem.answer) == depth
    word, pairs = text + problem.answer, ["()", "[]", "{}", "<>"][:symbols]
    while any(pair in word for pair in pairs):
        for pair in pairs:
            word = word.replace(pair, "")
    assert word == ""


@hypothesis.given(SEEDS, st.integers(1, 12), st.integers(3, 9))
def test_permutations_are_products_of_matrices(seed, swaps, items):
    problem = asked("permutations", swaps, seed, symbols=items)
    pairs = [(i, j) for i in range(items) for j in range(i + 1, items)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    product = np.eye(items, dtype=int)
    for letter in problem.prompt.removesuffix("="):
        swap = np.eye(items, dtype=int)
        i, j = pairs[letters.index(letter)]
        swap[[i, j]] = swap[[j, i]]
        product = swap @ product
    assert len(problem.prompt) == swaps + 1
    assert problem.answer == "".join(map(str, product @ np.arange(1, items + 1)))


@pytest.mark.parametrize(
    ("task", "first"),
    [
        ("p_hop", Problem(">>>bcdcadcdcdacbcacdbadbcacadbadbad", "d")),
        ("addition", Problem("174+896=", "1070")),
        ("dyck", Problem("()[]{}(({}){{}[]{({})}[({})]{()=", "}})")),
        ("permutations", Problem("ahe=", "24135")),
    ],
)
def test_problems_are_the_same_everywhere(task, first):
    """In all versions of Python: a run goes on elsewhere with the same problems."""
    config = SyntheticConfig(task=task)
    assert next(draw_problems(config, Random("a seed"), [3], held_out=False)) == first


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_of_a_test_is_trained_on(task):
    config = SyntheticConfig(task=task, difficulties=[1, 2])
    trained = itertools.islice(draw_problems(config, Random(0), [1, 2], held_out=False), 500)
    prompts = {problem.prompt for problem in trained}
    for difficulty in (1, 2):
        problems = make_test_set(config, difficulty, 40)
        assert all(is_held_out(task, problem) for problem in problems)
        assert prompts.isdisjoint(problem.prompt for problem in problems)
        assert len({problem.prompt for problem in problems}) == len(problems)
        assert make_test_set(config, difficulty, 40) == problems


def test_difficulties_come_in_equal_parts():
    config = SyntheticConfig(task="addition", difficulties=[1, 3, 5])
    problems = itertools.islice(draw_problems(config, Random(0), [1, 3, 5], held_out=False), 3000)
    digits = [problem.prompt.index("+") for problem in problems]
    for difficulty in (1, 3, 5):
        assert 900 < digits.count(difficulty) < 1100


def test_a_test_set_of_few_problems_has_them_all():
    config = SyntheticConfig(task="addition", difficulties=[1])
    sums = [Problem(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
    held_out = [one for one in sums if is_held_out("addition", one)]
    assert sorted(make_test_set(config, 1, 10**6)) == sorted(held_out)
    for one in sums:  # nor is a sum trained on the other way round
        left, right = one.prompt.removesuffix("=").split("+")
        other = Problem(f"{right}+{left}=", one.answer)
        assert is_held_out("addition", one) == is_held_out("addition", other)


def test_a_difficulty_without_problems_to_test_is_refused():
    config = SyntheticConfig(task="dyck", difficulties=[2], length=2, symbols=1)  # only `((=`
    held_out = is_held_out("dyck", Problem("((=", "))"))
    assert next(draw_problems(config, Random(0), [2], held_out)).answer == "))"
    with pytest.raises(
        InputError, match="dyck of difficulty 2 has too few problems: none is left for"
    ):
        next(draw_problems(config, Random(0), [2], not held_out))
