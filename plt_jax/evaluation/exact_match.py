"""How many held-out questions a model answers rightly, by difficulty, as it decodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic

from plt_jax.config import MeshConfig, ModelConfig
from plt_jax.config.data import QuestionsConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.data.synthetic_examples import QuestionEncoder, check_exam
from plt_jax.data.synthetic_tasks import Question, exam
from plt_jax.decoding.generation import generate
from plt_jax.decoding.layout import Params, prepare_for_decode
from plt_jax.decoding.sampling import Sampling
from plt_jax.distributed.mesh import make_mesh, use_mesh, whole_batch
from plt_jax.errors import InputError
from plt_jax.files import write_text
from plt_jax.model.looping import with_loops
from plt_jax.reports.tables import table_of
from plt_jax.runs.directory import Trained, open_trained

EXACT_MATCH = "exact_match.json"
QUESTIONS = 512
"""Asked of each difficulty, where there are so many."""


class ExactMatchReport(NamedTuple):
    """What was found, and where it was written."""

    numbers: dict[str, Any]
    """Accuracies, `by_difficulty`, and if asked the same `at_loops`."""
    path: Path

    def table(self) -> str:
        """A line for each difficulty, with the accuracy of each number of loops."""
        columns = [
            ("questions", "questions", "{}"),
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
) -> ExactMatchReport:
    """Asks a run or checkpoint the held-out questions of its task; writes exact_match.json.

    An answer is right if greedy decoding writes it to its last byte, and ends there.

    Args:
      difficulties: default the run's data.questions.test_difficulties.
      limit: questions of each difficulty; default QUESTIONS.
      batch_size: questions on all devices together, raised to divide over them; default the run's
        evaluation.batch_size.
      at_loops: numbers of loops that it answers with besides.

    Raises:
      InputError: no such checkpoint, one that was not trained on questions, a difficulty that has
        none or that the context does not hold, or an argument that is out of its range.
    """
    for name, value in (("--limit", limit), ("--batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    mesh = make_mesh(MeshConfig())
    trained = open_trained(path, mesh)
    size = whole_batch(batch_size or trained.config.evaluation.batch_size, mesh)
    others = {count: with_loops(trained.config.model, trained.params, count) for count in at_loops}
    asked = questions_asked(trained, difficulties)
    check_exam(asked, trained.config.model.max_length)
    papers = {one: exam(asked, one, limit or QUESTIONS) for one in asked.test_difficulties}
    encoder = QuestionEncoder(trained.tokenizer)

    def answer(model: ModelConfig, params: Any) -> list[dict[str, Any]]:
        with use_mesh(mesh):
            weights = prepare_for_decode(model, params)
            return [
                {
                    "difficulty": difficulty,
                    "trained": difficulty in asked.difficulties,
                    "questions": len(paper),
                    "accuracy": np.mean(mark(model, weights, encoder, paper, size)).item(),
                }
                for difficulty, paper in papers.items()
            ]

    numbers = {
        "step": trained.step,
        "task": asked.task,
        "limit": limit or QUESTIONS,
        "by_difficulty": answer(trained.config.model, trained.params),
    }
    if others:
        numbers["at_loops"] = [
            {"loops": count, "by_difficulty": answer(*other)} for count, other in others.items()
        ]
    target = trained.directory / EXACT_MATCH
    write_text(target, json.dumps(numbers, indent=2) + "\n")
    return ExactMatchReport(numbers, target)


def questions_asked(trained: Trained, difficulties: Sequence[int]) -> QuestionsConfig:
    """The run's task, with the difficulties to ask.

    Raises:
      InputError: it has none, or not such difficulties.
    """
    questions = trained.config.data.questions
    if questions.task == "none":
        raise InputError(
            f"{trained.directory} was trained on text, not on questions (data.questions.task); "
            "eval.py without --exact_match evaluates it"
        )
    if not difficulties:
        return questions
    try:
        return QuestionsConfig(**questions.model_dump() | {"test_difficulties": difficulties})
    except pydantic.ValidationError as error:
        raise InputError(f"--difficulties: {describe_errors(error)}") from error


def mark(
    config: ModelConfig,
    weights: Params,
    encoder: QuestionEncoder,
    questions: Sequence[Question],
    batch_size: int,
) -> list[bool]:
    """Whether greedy decoding writes each question's answer, and ends there.

    Args:
      weights: as `prepare_for_decode` lays them out.
      questions: of one difficulty: what fits the context of one fits all.
    """
    right = []
    # Nothing behind an answer is compared: stopping there saves time.
    sampling = Sampling(stop_tokens=(encoder.eos,))
    for start in range(0, len(questions), batch_size):
        asked = questions[start : start + batch_size]
        # All batches have as many rows, for which one program is compiled.
        prompts = [encoder.prompt(question) for question in asked]
        prompts += [prompts[-1]] * (batch_size - len(asked))
        wanted = [encoder.answer(question) for question in asked]
        tokens_BT = generate(config, weights, prompts, max(map(len, wanted)), sampling)
        right += [
            row[: len(answer)] == answer
            for row, answer in zip(tokens_BT.tolist(), wanted, strict=False)
        ]
    return right
