"""Exact match: the share of a synthetic task's test set that greedy decoding answers correctly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
from jax.sharding import Mesh

from plt_jax.config import MeshConfig, ModelConfig
from plt_jax.config.data import SyntheticConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.data.synthetic_examples import ProblemEncoder, check_test_set
from plt_jax.data.synthetic_tasks import Problem, make_test_set
from plt_jax.decoding.generation import GenerationRequest, generate_all
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.weights import DecodeWeights, prepare_for_decode
from plt_jax.distributed.mesh import make_mesh, use_mesh, whole_batch
from plt_jax.errors import InputError
from plt_jax.evaluation.results import write_results
from plt_jax.files.writing import to_json
from plt_jax.model.looping import with_loops
from plt_jax.reports.tables import table_of
from plt_jax.runs.directory import Trained, open_trained

EXACT_MATCH = "exact_match.json"
TEST_PROBLEMS = 512
"""Default size of a difficulty's test set; fewer are tested where there are fewer."""


class ExactMatchReport(NamedTuple):
    """The accuracies, and the file that holds them."""

    numbers: dict[str, Any]
    """What exact_match.json holds: accuracies `by_difficulty`, and if requested the same for other
    numbers of loops, `at_loops`."""
    path: Path

    def table(self) -> str:
        """The accuracies as text: a line for each difficulty, a column for each number of loops."""
        columns = [
            ("questions", "problems", "{}"),
            ("trained", "trained on", "{}"),
            ("accuracy", "right", "{:.1%}"),
        ]
        lines = [
            row
            | {
                "label": f"difficulty {row['difficulty']}",
                "trained": "yes" if row["trained"] else "no",
            }
            for row in self.numbers["by_difficulty"]
        ]
        for other in self.numbers.get("at_loops", []):
            name = "1 loop" if other["loops"] == 1 else f"{other['loops']} loops"
            columns.append((name, f"with {name}", "{:.1%}"))
            for line, row in zip(lines, other["by_difficulty"], strict=True):
                line[name] = row["accuracy"]
        return table_of(columns, lines)


def evaluate_exact_match(
    path: str,
    difficulties: Sequence[int] = (),
    limit: int | None = None,
    batch_size: int | None = None,
    at_loops: Sequence[int] = (),
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> ExactMatchReport:
    """Tests a run or checkpoint on its synthetic task; writes exact_match.json.

    An answer is correct if greedy decoding writes it to its last byte, and then ends it.

    Args:
      path: a run directory, or one of its checkpoints/STEP folders.
      difficulties: difficulties to test; default the run's data.synthetic.test_difficulties.
      limit: problems of each difficulty; default TEST_PROBLEMS.
      batch_size: problems on all devices together, rounded up to divide over them; default the
        run's evaluation.batch_size.
      at_loops: further numbers of loops to test the model with.
      mesh: the devices, which share batches and parameters; default all of them, along the data
        axis.
      dtype: dtype of the parameters; see `read_params`.

    Raises:
      InputError: there is no such checkpoint, it was trained on text, a difficulty has no held-out
        problem or one that the context cannot hold, or an argument is out of its range.
    """
    for name, value in (("--limit", limit), ("--batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    mesh = mesh or make_mesh(MeshConfig())
    trained = open_trained(path, mesh, dtype=dtype)
    size = whole_batch(batch_size or trained.config.evaluation.batch_size, mesh)
    others = {count: with_loops(trained.config.model, trained.params, count) for count in at_loops}
    task = task_to_test(trained, difficulties)
    test_sets = make_test_sets(task, limit or TEST_PROBLEMS, trained.config.model.max_length)
    encoder = ProblemEncoder(trained.tokenizer)

    def by_difficulty(model: ModelConfig, params: Any) -> list[dict[str, Any]]:
        with use_mesh(mesh):
            weights = prepare_for_decode(model, params)
            return [
                {
                    "difficulty": difficulty,
                    "trained": difficulty in task.difficulties,
                    "questions": len(problems),
                    "accuracy": np.mean(score(model, weights, encoder, problems, size)).item(),
                }
                for difficulty, problems in test_sets.items()
            ]

    numbers = {
        "step": trained.step,
        "task": task.task,
        "limit": limit or TEST_PROBLEMS,
        "by_difficulty": by_difficulty(trained.config.model, trained.params),
    }
    if others:
        numbers["at_loops"] = [
            {"loops": count, "by_difficulty": by_difficulty(*other)}
            for count, other in others.items()
        ]
    target = trained.directory / EXACT_MATCH
    write_results(target, [to_json(numbers, indent=2), "\n"])
    return ExactMatchReport(numbers, target)


def task_to_test(trained: Trained, difficulties: Sequence[int]) -> SyntheticConfig:
    """The run's synthetic task, with the given difficulties to test or else its own.

    Raises:
      InputError: the run was trained on text, or the task refuses the difficulties.
    """
    task = trained.config.data.synthetic
    if task.task == "none":
        raise InputError(
            f"{trained.directory} was trained on text, not on a synthetic task "
            "(data.synthetic.task); eval.py without --exact_match evaluates it"
        )
    if not difficulties:
        return task
    try:
        changed = task.model_dump() | {"test_difficulties": difficulties}
        return SyntheticConfig.model_validate(changed)
    except pydantic.ValidationError as error:
        raise InputError(f"--difficulties: {describe_errors(error)}") from error


def make_test_sets(task: SyntheticConfig, limit: int, max_length: int) -> dict[int, list[Problem]]:
    """The test set of each test difficulty, of at most `limit` problems.

    Raises:
      InputError: a difficulty has no held-out problem, or one that a context of `max_length` tokens
        cannot hold.
    """
    check_test_set(task, max_length)
    return {
        difficulty: make_test_set(task, difficulty, limit) for difficulty in task.test_difficulties
    }


def score(
    config: ModelConfig,
    weights: DecodeWeights,
    encoder: ProblemEncoder,
    problems: Sequence[Problem],
    batch_size: int,
) -> list[bool]:
    """Whether greedy decoding writes each problem's answer, and then ends it.

    Args:
      weights: from `prepare_for_decode`.
      problems: problems of one difficulty; the context must hold the longest of them.
      batch_size: problems to decode at a time.
    """
    correct = []
    # What a model writes after an answer is not compared, so decoding can stop there.
    sampling = Sampling(stop_tokens=(encoder.eos,))
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        # All batches have as many rows, so that one program is compiled for all.
        prompts = [encoder.prompt(problem) for problem in batch]
        prompts += [prompts[-1]] * (batch_size - len(batch))
        answers = [encoder.answer(problem) for problem in batch]
        request = GenerationRequest(prompts, max(map(len, answers)), sampling)
        tokens_BT = generate_all(config, weights, request).tokens
        correct += [
            row[: len(answer)] == answer
            for row, answer in zip(tokens_BT.tolist(), answers, strict=False)
        ]
    return correct
