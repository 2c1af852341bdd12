"""Problems as examples: what is packed, what is weighed, what an example depends on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.config import RunConfig
from plt_jax.data.load import load_data, validation_examples
from plt_jax.data.synthetic_examples import (
    VALIDATION_EXAMPLES,
    SyntheticExamples,
    byte_tokenizer,
)
from plt_jax.data.synthetic_tasks import Problem, is_held_out, make_test_set
from plt_jax.errors import InputError

T = 48


def config_of(task="permutations", seed=0, **fields) -> RunConfig:
    settings = {"task": task, "difficulties": [1, 2, 3], "length": 14} | fields
    return RunConfig.model_validate(
        {
            "seed": seed,
            "model": {"vocab_size": 258, "max_length": T},
            "data": {"synthetic": settings},
            "training": {"batch_size": 4},
        }
    )


def examples_of(config, held_out=False) -> SyntheticExamples:
    return SyntheticExamples(config, byte_tokenizer(config), held_out=held_out)


def problems_in(config, example) -> list[Problem]:
    """The problems of an example, read back from its arrays alone."""
    tokenizer, found = byte_tokenizer(config), []
    for number in range(1, example["segment_ids"].max() + 1):
        inside = example["segment_ids"] == number
        tokens, targets = example["tokens"][inside], example["targets"][inside]
        answers = example["weights"][inside] == 1
        assert tokens[0] == tokenizer.special.bos
        assert targets[-1] == tokenizer.eos
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        assert not answers[: answers.argmax()].any() and answers[answers.argmax() :].all()
        prompt = tokens[1 : answers.argmax() + 1]
        found.append(Problem(tokenizer.decode(prompt), tokenizer.decode(targets[answers][:-1])))
    return found


@settings(max_examples=40)
@given(
    st.sampled_from(["p_hop", "addition", "dyck", "permutations"]),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_examples_hold_whole_problems_and_weigh_answers(task, index, held_out):
    config = config_of(task)
    index %= VALIDATION_EXAMPLES if held_out else 10**6
    example = examples_of(config, held_out)[index]
    assert {name: array.dtype.name for name, array in example.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "weights": "float32",
    }
    problems = problems_in(config, example)
    assert len(problems) >= 2
    flags = [is_held_out(task, problem) for problem in problems]
    assert flags == [held_out] * len(problems)
    used = int((example["segment_ids"] > 0).sum())
    assert used == sum(len(q.prompt) + len(q.answer) + 1 for q in problems)
    for name, array in example.items():
        assert array.shape == (T,), name
        assert not array[used:].any()


@pytest.mark.parametrize("task", ["addition", "permutations"])
def test_difficulties_come_in_equal_parts_however_long_their_problems(task):
    config = config_of(task, difficulties=[1, 4, 8])
    examples = examples_of(config)
    problems = [one for index in range(400) for one in problems_in(config, examples[index])]
    # Digits of a summand, or swaps.
    sizes = [len(problem.prompt.rstrip("=").split("+")[0]) for problem in problems]
    for difficulty in (1, 4, 8):
        assert sizes.count(difficulty) / len(sizes) == pytest.approx(1 / 3, abs=0.05)


def test_an_example_depends_on_seed_and_index_alone():
    one, other, same = (examples_of(config_of(seed=seed)) for seed in (0, 1, 0))
    for index in (5, 0, 5, 2**40):
        np.testing.assert_equal(one[index], same[index])
        assert not np.array_equal(one[index]["tokens"], other[index]["tokens"])
    held_out = [examples_of(config_of(seed=seed), held_out=True) for seed in (0, 1)]
    np.testing.assert_equal(list(held_out[0]), list(held_out[1]))
    assert len(held_out[0]) == VALIDATION_EXAMPLES


def test_a_run_reads_them_and_goes_on_where_it_was():
    config = config_of()
    data = load_data(config)
    batches = iter(data.training)
    read = [next(batches) for _ in range(3)]
    state = batches.get_state()
    behind = [next(batches) for _ in range(2)]
    again = iter(load_data(config).training)
    again.set_state(state)
    np.testing.assert_equal([next(again) for _ in range(2)], behind)
    examples = examples_of(config)
    for number, batch in enumerate([*read, *behind]):
        for row in range(4):
            one = {name: array[row] for name, array in batch.items()}
            np.testing.assert_equal(one, examples[4 * number + row])
    half = next(iter(load_data(config, rows=np.array([1, 3])).training))
    np.testing.assert_array_equal(half["tokens"], read[0]["tokens"][[1, 3]])


@pytest.mark.slow(reason="draws all examples of a run")
@pytest.mark.parametrize("task", ["addition", "permutations"])
def test_nothing_that_is_asked_in_tests_is_in_what_a_run_reads(task):
    """There are few problems, so all are read: those that are not, are held out."""
    config = config_of(task, difficulties=[1, 2], test_difficulties=[1, 2], symbols=None)
    data, examples = load_data(config), examples_of(config)
    batches = iter(data.training)
    rows = [
        {name: array[row] for name, array in batch.items()}
        for batch in itertools.islice(batches, 1500)
        for row in range(4)
    ]
    read = {problem.prompt for row in rows for problem in problems_in(config, row)}
    asked = {
        q.prompt for level in (1, 2) for q in make_test_set(config.data.synthetic, level, 10**6)
    }
    validated = {q.prompt for one in data.validation for q in problems_in(config, one)}
    assert asked and validated
    assert read.isdisjoint(asked | validated)
    every = 100 + 90 * 90 if task == "addition" else 10 + 100
    assert len(read) > 0.9 * (every - len(asked))
    assert read == {q.prompt for i in range(6000) for q in problems_in(config, examples[i])}


def test_what_is_said_of_the_data():
    config = config_of("addition")
    data = load_data(config)
    line = "training on the synthetic task addition, difficulties 1, 2, 3, generated as needed"
    assert data.about == [line]
    np.testing.assert_equal(
        list(validation_examples(config, data.tokenizer)), list(data.validation)
    )
    drawn = itertools.islice(examples_of(config), 200)
    problems = [one for example in drawn for one in problems_in(config, example)]
    answers = [len(problem.answer) for problem in problems]
    assert data.bytes_per_target == pytest.approx(
        sum(answers) / (sum(answers) + len(answers)), rel=0.01
    )
    assert load_data(config_of("addition", seed=3)).fingerprint == data.fingerprint
    assert load_data(config_of("addition", difficulties=[1])).fingerprint != data.fingerprint
    other = config_of("addition", test_difficulties=[4])
    assert load_data(other).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"difficulties": [1, 60]},
            "of difficulty 60 takes up to 67 tokens, more than data.sequence_length 48",
        ),
        (
            {"test_difficulties": [60]},
            "of difficulty 60 takes up to 68 tokens, more than model.max_length 48",
        ),
        (
            {"task": "dyck", "difficulties": [2], "length": 2, "symbols": 1},
            "dyck of difficulty 2 has too few problems: none is left for",
        ),
    ],
)
def test_what_cannot_be_tested_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        load_data(config_of(**fields))


def test_another_tokenizer_is_refused(tmp_path):
    config = config_of()
    tokenizer = byte_tokenizer(config)
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.library.to_str())
    named = config.model_copy(
        update={"tokenizer": config.tokenizer.model_copy(update={"path": str(path)})}
    )
    assert load_data(named).fingerprint == load_data(config).fingerprint
    tokenizer.library.add_tokens(["more"])
    path.write_text(tokenizer.library.to_str())
    with pytest.raises(InputError, match="is not the tokenizer of synthetic tasks"):
        load_data(named)
