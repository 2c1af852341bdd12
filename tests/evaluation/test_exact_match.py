"""Exact match: answers by the decoder against a plain forward pass, and what the command says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax.data.synthetic_examples import ProblemEncoder
from plt_jax.data.synthetic_tasks import Problem, make_test_set
from plt_jax.decoding.weights import prepare_for_decode
from plt_jax.errors import InputError
from plt_jax.evaluation import exact_match
from plt_jax.evaluation.exact_match import evaluate_exact_match, score
from plt_jax.model.looping import with_loops
from plt_jax.runs.directory import open_trained
from plt_jax.training.trainer import train
from tests.models import forward, random_params, small_config
from tests.training.runs import assert_refused, command, tiny_config

END = 12
"""A token that the models below write, some sooner and some later."""
TASK = {"task": "permutations", "difficulties": [1, 2], "test_difficulties": [1, 2, 3]}


class Tokens(ProblemEncoder):
    """Problems whose prompts and answers are tokens, written as numbers."""

    eos = END

    def __init__(self):
        pass

    def prompt(self, problem):
        return [int(word) for word in problem.prompt.split()]

    def answer(self, problem):
        return [int(word) for word in problem.answer.split()]


def written_greedily(config, params, prompt, most=6) -> list[int]:
    """By whole forward passes, up to END."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + most and END not in tokens[len(prompt) :]:
        logits = forward(config)(params, jnp.array([tokens + [0] * (16 - len(tokens))]))
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize(("scheme", "count"), [("no_loop", 1), ("plt", 3), ("vanilla_loop", 2)])
def test_scores_are_those_of_the_forward_pass(scheme, count):
    config = small_config(scheme, count)
    params = random_params(config)
    random = np.random.default_rng(0)
    prompts = [random.integers(6, 31, 4).tolist() for _ in range(7)]
    answers = [written_greedily(config, params, prompt) for prompt in prompts]
    ends = {len(answer) for answer in answers if answer[-1] == END}
    assert len(ends) > 1 and any(answer[-1] != END for answer in answers)
    wrong = [[*answers[0][:-1], 30], [*answers[1], 30], [*answers[2][:-1], END]]
    problems = [
        Problem(" ".join(map(str, prompt)), " ".join(map(str, answer)))
        for prompt, answer in zip([*prompts, *prompts[:3]], [*answers, *wrong], strict=True)
    ]
    weights = prepare_for_decode(config, params)
    found = score(config, weights, Tokens(), problems, 4)
    assert found == [*[True] * 7, *[False] * 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a synthetic task."""
    home = tmp_path_factory.mktemp("synthetic")
    config = tiny_config(home, home / "run", data={"synthetic": TASK})
    train(config)
    return home / "run"


@pytest.mark.slow(reason="trains a run of its own")
def test_the_command_scores_a_run_by_difficulty(run):
    result = command("eval.py", run, "--exact_match", "--limit", "9", "--at_loops", "1,2")
    assert result.code == 0, result
    numbers = json.loads((run / "exact_match.json").read_text())
    rows = numbers["by_difficulty"]
    assert [row["difficulty"] for row in rows] == [1, 2, 3]
    assert [row["trained"] for row in rows] == [True, True, False]
    trained = open_trained(run)
    for row in rows:
        problems = make_test_set(trained.config.data.synthetic, row["difficulty"], 9)
        assert row["questions"] == len(problems)
        encoder = ProblemEncoder(trained.tokenizer)
        weights = prepare_for_decode(trained.config.model, trained.params)
        scores = score(trained.config.model, weights, encoder, problems, 3)
        assert row["accuracy"] == pytest.approx(np.mean(scores))
    assert [one["loops"] for one in numbers["at_loops"]] == [1, 2]
    assert numbers["at_loops"][1]["by_difficulty"] == rows
    lines = result.out.splitlines()
    assert "with 1 loop  " in lines[0] and lines[3].split()[:4] == ["difficulty", "3", "9", "no"]


@pytest.mark.slow(reason="compiles several programs")
def test_each_number_of_loops_answers_for_itself(run, monkeypatch):
    """Rightly if there are three, of which each has its weights."""
    trained = open_trained(run)

    def right_with_three(config, weights, encoder, problems, size):
        own = with_loops(trained.config.model, trained.params, config.loop.count)
        jax.tree.map(np.testing.assert_array_equal, weights, prepare_for_decode(*own))
        return [config.loop.count == 3] * len(problems)

    monkeypatch.setattr(exact_match, "score", right_with_three)
    numbers = evaluate_exact_match(str(run), limit=4, at_loops=[1, 3]).numbers
    accuracies = {
        one["loops"]: {row["accuracy"] for row in one["by_difficulty"]}
        for one in numbers["at_loops"]
    }
    assert accuracies == {1: {0.0}, 3: {1.0}}
    assert {row["accuracy"] for row in numbers["by_difficulty"]} == {0.0}


@pytest.mark.slow(reason="trains a run of its own")
def test_other_evaluations_read_its_held_out_answers(run):
    result = command("eval.py", run)
    assert result.code == 0, result
    assert json.loads((run / "eval.json").read_text())["text"] == (
        "held out from the synthetic task permutations"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"difficulties": [90]},
            "of difficulty 90 takes up to 98 tokens, more than model.max_length 16",
        ),
        ({"difficulties": [0]}, "--difficulties: test_difficulties.0 = 0: input should be greater"),
        ({"limit": 0}, "--limit is 0; it must be at least 1"),
        ({"batch_size": -1}, "--batch_size is -1; it must be at least 1"),
        ({"at_loops": [0]}, "plt cannot run 0 loops"),
    ],
)
def test_what_cannot_be_tested_is_refused(run, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate_exact_match(str(run), **arguments)


def test_a_run_on_text_has_no_test_set(finished):
    with pytest.raises(InputError, match="was trained on text, not on a synthetic task"):
        evaluate_exact_match(str(finished.directory))
    result = command("eval.py", finished.directory, "--difficulties", "1")
    assert_refused(result, "--difficulties is for --exact_match")
    result = command("eval.py", finished.directory, "--exact_match", "--difficulties", "hard")
    assert_refused(result, "argument --difficulties: hard is not a list of numbers, as 1,2,3")
    result = command("eval.py", finished.directory, "--exact_match", "--loops")
    assert_refused(result, "exclude one another")


def test_documents_of_a_synthetic_task_are_refused(run):
    result = command("eval.py", run, "--by_document")
    assert_refused(
        result, "was trained on a synthetic task, which has no documents", "--exact_match"
    )
