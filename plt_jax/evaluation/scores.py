"""Loss, perplexity and bits per byte of a trained model: the default evaluation of eval.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from plt_jax.config import MeshConfig
from plt_jax.data.load import examples_for
from plt_jax.data.token_bytes import token_bytes
from plt_jax.distributed.mesh import make_mesh
from plt_jax.errors import InputError
from plt_jax.evaluation.perplexity import make_evaluate
from plt_jax.evaluation.results import write_results
from plt_jax.files.writing import to_json
from plt_jax.model.looping import with_loops
from plt_jax.runs.directory import open_trained

EVALUATION = "eval.json"


class ScoreReport(NamedTuple):
    """The scores of a model, and the file that holds them."""

    numbers: dict[str, Any]
    """The content of eval.json: `loss`, `perplexity` and `bits_per_byte` of the last loop, the same
    `by_loop` and, if requested, `at_loops`, and the text and its size."""
    path: Path

    def table(self) -> str:
        """A table with a line per loop; the last loop is the model's own output."""
        lines = [f"{'loop':>4}  {'loss':>8}  {'perplexity':>10}  {'bits per byte':>13}"]
        lines += [line_of(row["loop"], row) for row in self.numbers["by_loop"]]
        if "at_loops" in self.numbers:
            lines += ["with other numbers of loops:"]
            lines += [line_of(row["loops"], row) for row in self.numbers["at_loops"]]
        return "\n".join(lines)


def line_of(loop: int, row: Mapping[str, float]) -> str:
    """A line of the table: the scores of a loop, or of a number of loops."""
    return (
        f"{loop:>4}  {row['loss']:>8.4f}  {row['perplexity']:>10.2f}  {row['bits_per_byte']:>13.4f}"
    )


def evaluate_trained(
    path: str,
    text: str | None = None,
    batch_size: int | None = None,
    at_loops: Sequence[int] = (),
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> ScoreReport:
    """Evaluates a run or checkpoint on its held-out documents, or on other text; writes eval.json.

    Args:
      at_loops: further numbers of loops to evaluate the model with; they may differ from the number
        that it was trained with.
      mesh: the devices, which share batches and parameters; default all of them, along the data
        axis.
      dtype: dtype of the parameters; see `read_params`.

    Raises:
      InputError: no such checkpoint or text, a batch size that is not positive, or a number of
        loops that the scheme cannot run.
    """
    # The mesh of the training does not matter.
    mesh = mesh or make_mesh(MeshConfig())
    trained = open_trained(path, mesh, dtype=dtype)
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
    write_results(target, [to_json(numbers, indent=2), "\n"])
    return ScoreReport(numbers, target)
