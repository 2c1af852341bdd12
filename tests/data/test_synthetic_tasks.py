"""Questions against answers found in other ways: by search, by reduction, by matrices."""

import itertools
import re
from random import Random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from plt_jax.config.data import QuestionsConfig
from plt_jax.data.synthetic_tasks import TASKS, Question, draw, exam, hop, is_held_out
from plt_jax.errors import InputError

SEEDS = st.integers(0, 10**6)


def asked(task, difficulty, seed, **settings) -> Question:
    config = QuestionsConfig(task=task, difficulties=[difficulty], **settings)
    return TASKS[task].make(Random(seed), difficulty, config)


@hypothesis.given(SEEDS, st.integers(1, 6), st.integers(3, 8))
def test_p_hop_follows_the_latest_earlier_occurrence(seed, hops, symbols):
    length = hops * symbols + 1 + seed % 9
    question = asked("p_hop", hops, seed, length=length, symbols=symbols)
    text = question.prompt.lstrip(">")
    assert question.prompt == ">" * hops + text
    assert len(text) == length
    assert set(text) <= set("abcdefgh"[:symbols])
    assert not re.search(r"(.)\1", text)
    place = length - 1
    for _ in range(hops):
        place = text.rindex(text[place], 0, place) + 1
    assert question.answer == text[place]


@hypothesis.given(SEEDS, st.sampled_from(list(TASKS)), st.integers(1, 12))
def test_no_question_is_longer_than_its_task_says(seed, task, difficulty):
    config = QuestionsConfig(task=task, difficulties=[difficulty], length=49)
    question = TASKS[task].make(Random(seed), difficulty, config)
    spare = TASKS[task].length(difficulty, config) - len(question.prompt) - len(question.answer)
    assert 0 <= spare <= 1


def test_hops_of_a_string_by_hand():
    letters = ["abcabdacd".index(letter) for letter in "abcabdacd"]  # a b c a b d a c d
    assert hop(letters, 1) == 6  # the d before is followed by a,
    assert hop(letters, 2) == 4  # the a before that by b,
    assert hop(letters, 3) == 2  # the b before that by c,
    assert hop(letters, 4) is None  # which has not come before


@hypothesis.given(SEEDS, st.integers(1, 30))
def test_addition_is_of_numbers_of_so_many_digits(seed, digits):
    question = asked("addition", digits, seed)
    one, other = question.prompt.removesuffix("=").split("+")
    assert len(one) == len(other) == digits
    assert digits == 1 or "0" not in (one[0], other[0])
    assert question.answer == str(int(one) + int(other))


@hypothesis.given(SEEDS, st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_dyck_closes_what_is_open(seed, depth, symbols, more):
    question = asked("dyck", depth, seed, length=depth + more, symbols=symbols)
    text = question.prompt.removesuffix("=")
    assert len(text) == depth + more - more % 2
    assert len(question.answer) == depth
    word, pairs = text + question.answer, ["()", "[]", "{}", "<>"][:symbols]
    while any(pair in word for pair in pairs):
        for pair in pairs:
            word = word.replace(pair, "")
    assert word == ""


@hypothesis.given(SEEDS, st.integers(1, 12), st.integers(3, 9))
def test_permutations_are_products_of_matrices(seed, swaps, items):
    question = asked("permutations", swaps, seed, symbols=items)
    pairs = [(i, j) for i in range(items) for j in range(i + 1, items)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    product = np.eye(items, dtype=int)
    for letter in question.prompt.removesuffix("="):
        swap = np.eye(items, dtype=int)
        i, j = pairs[letters.index(letter)]
        swap[[i, j]] = swap[[j, i]]
        product = swap @ product
    assert len(question.prompt) == swaps + 1
    assert question.answer == "".join(map(str, product @ np.arange(1, items + 1)))


@pytest.mark.parametrize(
    ("task", "first"),
    [
        ("p_hop", Question(">>>bcdcadcdcdacbcacdbadbcacadbadbad", "d")),
        ("addition", Question("174+896=", "1070")),
        ("dyck", Question("()[]{}(({}){{}[]{({})}[({})]{()=", "}})")),
        ("permutations", Question("ahe=", "24135")),
    ],
)
def test_questions_are_the_same_everywhere(task, first):
    """In all versions of Python: a run goes on elsewhere with the same questions."""
    config = QuestionsConfig(task=task)
    assert next(draw(config, Random("a seed"), [3], held_out=False)) == first


@pytest.mark.parametrize("task", TASKS)
def test_no_question_of_a_test_is_trained_on(task):
    config = QuestionsConfig(task=task, difficulties=[1, 2])
    trained = itertools.islice(draw(config, Random(0), [1, 2], held_out=False), 500)
    prompts = {question.prompt for question in trained}
    for difficulty in (1, 2):
        paper = exam(config, difficulty, 40)
        assert all(is_held_out(task, question) for question in paper)
        assert prompts.isdisjoint(question.prompt for question in paper)
        assert len({question.prompt for question in paper}) == len(paper)
        assert exam(config, difficulty, 40) == paper


def test_difficulties_come_in_equal_parts():
    config = QuestionsConfig(task="addition", difficulties=[1, 3, 5])
    questions = itertools.islice(draw(config, Random(0), [1, 3, 5], held_out=False), 3000)
    digits = [question.prompt.index("+") for question in questions]
    for difficulty in (1, 3, 5):
        assert 900 < digits.count(difficulty) < 1100


def test_an_exam_of_few_questions_has_them_all():
    config = QuestionsConfig(task="addition", difficulties=[1])
    sums = [Question(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
    held_out = [one for one in sums if is_held_out("addition", one)]
    assert sorted(exam(config, 1, 10**6)) == sorted(held_out)
    for one in sums:  # nor is a sum trained on the other way round
        left, right = one.prompt.removesuffix("=").split("+")
        other = Question(f"{right}+{left}=", one.answer)
        assert is_held_out("addition", one) == is_held_out("addition", other)


def test_a_difficulty_without_questions_to_test_is_refused():
    config = QuestionsConfig(task="dyck", difficulties=[2], length=2, symbols=1)  # only `((=`
    held_out = is_held_out("dyck", Question("((=", "))"))
    assert next(draw(config, Random(0), [2], held_out)).answer == "))"
    with pytest.raises(InputError, match="dyck of difficulty 2 has no question for"):
        next(draw(config, Random(0), [2], not held_out))
