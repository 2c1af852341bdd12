"""The evaluation that eval.py prints and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.config import MeshConfig
from plt_jax.data.load import examples_for
from plt_jax.data.tokenizer import token_bytes
from plt_jax.distributed.mesh import make_mesh
from plt_jax.errors import InputError
from plt_jax.evaluation.perplexity import make_evaluate
from plt_jax.files import write_text
from plt_jax.model.looping import with_loops
from plt_jax.runs.directory import open_trained

EVALUATION = "eval.json"


class Report(NamedTuple):
    """What was found, and where it was written."""

    numbers: dict[str, Any]
    """`loss`, `perplexity`, `bits_per_byte` of the last loop, the same `by_loop` and, if asked,
    `at_loops`, and what was read."""
    path: Path

    def table(self) -> str:
        """The numbers by loop, as text; the last loop's are the model's."""
        lines = [f"{'loop':>4}  {'loss':>8}  {'perplexity':>10}  {'bits per byte':>13}"]
        lines += [line_of(row["loop"], row) for row in self.numbers["by_loop"]]
        if "at_loops" in self.numbers:
            lines += ["with as many loops:"]
            lines += [line_of(row["loops"], row) for row in self.numbers["at_loops"]]
        return "\n".join(lines)


def line_of(loop: int, row: Mapping[str, float]) -> str:
    """A loop's, or a number of loops', scores as a line of the table."""
    return (
        f"{loop:>4}  {row['loss']:>8.4f}  {row['perplexity']:>10.2f}  {row['bits_per_byte']:>13.4f}"
    )


def evaluate_trained(
    path: str,
    text: str | None = None,
    batch_size: int | None = None,
    at_loops: Sequence[int] = (),
) -> Report:
    """Evaluates a run or checkpoint on its held-out documents, or on other text; writes eval.json.

    Args:
      at_loops: numbers of loops that it is evaluated with besides, more or fewer than it was
        trained with.

    Raises:
      InputError: no such checkpoint or text, a batch size that is not positive, or a number of
        loops that the scheme cannot run.
    """
    # All devices here share the batch, whatever mesh the run was trained on.
    mesh = make_mesh(MeshConfig())
    trained = open_trained(path, mesh)
    config = trained.config
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"--batch_size is {batch_size}; it must be at least 1")
        evaluation = config.evaluation.model_copy(update={"batch_size": batch_size})
        config = config.model_copy(update={"evaluation": evaluation})
    examples = examples_for(config, trained.tokenizer, text)
    bytes_V = token_bytes(trained.tokenizer, config.model.vocab_size)
    others = {count: with_loops(config.model, trained.params, count) for count in at_loops}
    evaluation = make_evaluate(config, mesh, bytes_V)(trained.params, examples, None)
    numbers = {
        "step": trained.step,
        "text": text or f"held out from {config.data.text}",
        **evaluation.to_json(),
    }
    for count, (model, params) in others.items():
        evaluate = make_evaluate(config.model_copy(update={"model": model}), mesh, bytes_V)
        score = evaluate(params, examples, None).score
        numbers.setdefault("at_loops", []).append({"loops": count, **score._asdict()})
    target = trained.directory / EVALUATION
    write_text(target, json.dumps(numbers, indent=2) + "\n")
    return Report(numbers, target)
