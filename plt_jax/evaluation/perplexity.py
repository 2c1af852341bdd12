"""Loss, perplexity and bits per byte on packed text, for every loop.

A loop's score is that of the head applied to its output; the last loop's score is the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plt_jax.config import ModelConfig, RunConfig
from plt_jax.data.packing import Examples
from plt_jax.data.pipeline import evaluation_batches
from plt_jax.distributed.mesh import batch_layout, use_mesh, whole_batch
from plt_jax.model.transformer import Transformer


class Score(NamedTuple):
    """How well a model predicts a text."""

    loss: float
    """Nats per token."""
    perplexity: float
    """exp(loss); not comparable across tokenizers."""
    bits_per_byte: float
    """Bits per UTF-8 byte of text; comparable across tokenizers."""


class Evaluation(NamedTuple):
    """The scores of a model on a text."""

    by_loop: list[Score]
    """The score of the head on each loop's normed output, loop 1 first."""
    tokens: int
    """The number of predicted tokens."""
    text_bytes: int
    """The number of UTF-8 bytes that these tokens stand for."""

    @property
    def score(self) -> Score:
        """The model's own score."""
        return self.by_loop[-1]

    def to_json(self) -> dict[str, Any]:
        """The evaluation in the form of eval.json."""
        by_loop = [{"loop": index + 1, **s._asdict()} for index, s in enumerate(self.by_loop)]
        return {
            **self.score._asdict(),
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "by_loop": by_loop,
        }


def make_evaluate(
    config: RunConfig, mesh: Mesh, token_bytes: np.ndarray
) -> Callable[[Any, Examples, int | None], Evaluation]:
    """`evaluate(params, examples, limit) -> Evaluation`, compiled once for the mesh.

    `limit` is the number of examples to read, evenly spaced; None reads all. A batch has
    evaluation.batch_size rows, rounded up to a number that divides over the mesh.

    Raises:
      InputError: data.sequence_length does not divide over the mesh.
    """
    batch_size = whole_batch(config.evaluation.batch_size, mesh)
    layout = batch_layout(
        mesh,
        ("evaluation.batch_size", batch_size),
        ("data.sequence_length", config.sequence_length),
    )
    # Evaluations of one process share what they compile, since they jit the same function.
    whole = NamedSharding(mesh, PartitionSpec())
    sums_of = jax.jit(batch_sums, static_argnums=0, out_shardings=whole)

    def evaluate(params: Any, examples: Examples, limit: int | None) -> Evaluation:
        nats, tokens, text_bytes = np.zeros(config.model.loop.count), 0, 0
        with use_mesh(mesh):
            for batch in evaluation_batches(examples, batch_size, limit, layout.rows):
                sums = sums_of(config.model, params, layout.place(batch), token_bytes)
                sums = jax.device_get(sums)
                nats += sums.nats_L.astype(np.float64)
                tokens, text_bytes = tokens + int(sums.tokens), text_bytes + int(sums.text_bytes)
        return Evaluation([score(n, tokens, text_bytes) for n in nats], tokens, text_bytes)

    return evaluate


class BatchSums(NamedTuple):
    """The sums of a batch, from which an evaluation is computed."""

    nats_L: jax.Array
    """Summed negative log-likelihood of the targets in nats, by loop, float32 [L]."""
    tokens: jax.Array
    """The number of targets, int32 scalar."""
    text_bytes: jax.Array
    """The number of UTF-8 bytes that the targets stand for, int32 scalar."""


def batch_sums(
    config: ModelConfig, params: Any, batch: dict[str, jax.Array], token_bytes_V: jax.Array
) -> BatchSums:
    """The sums over all rows of a batch."""
    counted_BT = batch["weights"] > 0
    bytes_BT = jnp.where(counted_BT, token_bytes_V[batch["targets"]], 0)
    nats_L = losses_by_loop(config, params, batch)
    return BatchSums(nats_L, jnp.sum(counted_BT, dtype=jnp.int32), jnp.sum(bytes_BT))


def losses_by_loop(config: ModelConfig, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Summed negative log-likelihood of a batch's targets in nats, by loop, float32 [L]."""
    model = Transformer(config)

    def losses(model: Transformer) -> jax.Array:
        def summed(read_BTD: jax.Array) -> jax.Array:
            return model.loss(read_BTD, batch["targets"], batch["weights"]).nll

        inputs = batch["tokens"], batch["segment_ids"]
        readouts_LBTD = model.readouts(model.loop_states(*inputs), model.context(*inputs))
        # One loop at a time, because the logits of a block are large.
        return jax.lax.map(summed, readouts_LBTD)

    nats_L: Any = model.apply({"params": params}, method=losses)
    return nats_L


def score(nats: float, tokens: int, text_bytes: int) -> Score:
    """The score of summed nats over a number of tokens and the bytes they stand for."""
    loss = float(nats) / max(tokens, 1)
    return Score(loss, math.exp(min(loss, 700.0)), float(nats) / math.log(2) / max(text_bytes, 1))
