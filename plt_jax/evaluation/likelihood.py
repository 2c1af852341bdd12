"""Log-likelihoods of given tokens: sequences of any lengths, batched by length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plt_jax.config import ModelConfig
from plt_jax.distributed.axes import shard
from plt_jax.distributed.mesh import batch_layout, mesh_axes, use_mesh
from plt_jax.errors import InputError
from plt_jax.model.loss import cross_entropy
from plt_jax.model.transformer import Transformer

SHORTEST = 32
"""The least number of tokens that sequences are padded to."""
LOGITS = 2**28
"""Largest number of logits that are computed at once; more are computed in chunks."""


class Scored(NamedTuple):
    """A sequence of tokens; those from index `first` on are scored, each given all before it."""

    tokens: Sequence[int] | np.ndarray
    first: int


class Likelihood(NamedTuple):
    """The likelihood of a sequence's scored tokens."""

    log_probability: float
    """The sum of their log-probabilities, in nats."""
    greedy: bool
    """Whether each of them is the most probable token at its position."""


def likelihoods(
    config: ModelConfig,
    params: Any,
    mesh: Mesh,
    sequences: Sequence[Scored],
    batch_size: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """The likelihoods of sequences, in their order; the longest are computed first.

    Sequences of similar length share a batch and a compiled program. That does not change the
    results: no position sees later positions or other rows.

    Args:
      params: as `Transformer.init` gives them, over the mesh.
      batch_size: rows on all devices of the mesh together.
      done: is called after each batch with its number of sequences.

    Raises:
      InputError: a sequence is longer than the context, or scores its first token, which has no
        token before it; or the batch size does not divide over the mesh.
    """
    found: dict[int, Likelihood] = {}
    compute = partial(_score, config, params)
    for index, (nll_n, greedy_n) in in_batches(config, mesh, sequences, batch_size, compute, done):
        total = float(np.sum(nll_n, dtype=np.float64))
        found[index] = Likelihood(-total, bool(np.all(greedy_n)))
    return [found[index] for index in range(len(sequences))]


def in_batches(
    config: ModelConfig,
    mesh: Mesh,
    sequences: Sequence[Scored],
    batch_size: int,
    compute: Callable[..., tuple[jax.Array, ...]],
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Computes values of the scored tokens of sequences, the longest sequences first.

    Yields the index of a sequence and its values.

    Args:
      compute: `compute(tokens_BT=..., targets_BT=...)` returns arrays [B, ..., T]; the yielded
        values are their parts at the scored tokens, [..., n].
      mesh, batch_size, done: see `likelihoods`.

    Raises:
      InputError: as `likelihoods`.
    """
    for tokens, first in sequences:
        if len(tokens) > config.max_length + 1:  # the last token is only predicted
            raise InputError(
                f"{len(tokens)} tokens are more than a context of {config.max_length} "
                "(model.max_length) and one behind it"
            )
        if not 0 < first <= len(tokens):
            raise InputError(f"cannot score from token {first} of {len(tokens)}: 1 is the earliest")
    parts = math.prod(mesh.shape[axis] for axis in mesh_axes("length"))
    with use_mesh(mesh):
        for length, indices in _batches(config, sequences, batch_size, parts):
            rows = [sequences[index] for index in indices]
            layout = batch_layout(mesh, ("batch_size", batch_size), ("tokens", length))
            batch = layout.place_whole(_padded(rows, batch_size, length))
            arrays = jax.device_get(compute(**batch))
            for row, (index, (tokens, first)) in enumerate(zip(indices, rows, strict=True)):
                scored = slice(first - 1, len(tokens) - 1)
                yield index, tuple(array[row][..., scored] for array in arrays)
            done(len(rows))


def _batches(
    config: ModelConfig, sequences: Sequence[Scored], batch_size: int, parts: int
) -> Iterator[tuple[int, list[int]]]:
    """The padded length of each batch, a multiple of `parts` if that of the context is, and the
    indices of its sequences."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = len(sequences[indices[0]].tokens) - 1
        whole = -(-padded_length(longest, config.max_length) // parts) * parts
        yield min(whole, config.max_length), indices


def padded_length(length: int, most: int) -> int:
    """The length to which sequences are padded, at most `most`.

    There are four such lengths per doubling, so that few programs are compiled.
    """
    if length <= SHORTEST:
        return min(SHORTEST, most)
    step = 1 << max((length - 1).bit_length() - 3, 0)
    return min(-(-length // step) * step, most)


def _padded(rows: Sequence[Scored], batch_size: int, length: int) -> dict[str, np.ndarray]:
    """A batch of sequences, padded with token 0 to `length`, as tokens and targets [B, T]."""
    tokens_BS = np.zeros((batch_size, length + 1), np.int32)
    for row, (tokens, _) in zip(tokens_BS, rows, strict=False):
        row[: len(tokens)] = tokens
    return {"tokens_BT": tokens_BS[:, :-1], "targets_BT": tokens_BS[:, 1:]}


@partial(jax.jit, static_argnums=0)
def _score(
    config: ModelConfig, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each target's negative log-likelihood, float32, and whether it is the most probable token,
    [B, T]."""

    def scores(model: Transformer) -> tuple[jax.Array, jax.Array]:
        states = model.loop_states(tokens_BT)
        nll_BT, greedy_BT = score_in_chunks(model, states.output_LBTD[-1], targets_BT)
        return shard(nll_BT), shard(greedy_BT)  # every process reads them

    nll_and_greedy: Any = Transformer(config).apply({"params": params}, method=scores)
    return nll_and_greedy


@partial(jax.jit, static_argnums=0)
def nll_by_loop(
    config: ModelConfig, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array]:
    """Each target's negative log-likelihood at the output of every loop, float32 [B, L, T]."""

    def scores(model: Transformer) -> jax.Array:
        def of_loop(read_BTD: jax.Array) -> jax.Array:
            nll_BT, _ = score_in_chunks(model, read_BTD, targets_BT)
            return nll_BT

        states, context = model.loop_states(tokens_BT), model.context(tokens_BT)
        return jax.lax.map(of_loop, model.readouts(states, context))

    nll_LBT: Any = Transformer(config).apply({"params": params}, method=scores)
    return (shard(jnp.moveaxis(nll_LBT, 0, 1)),)  # every process reads them


def score_in_chunks(
    model: Transformer, normed_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The values of `_score` for normed states, computed in chunks of positions if there are more
    than LOGITS logits."""
    B, T = targets_BT.shape
    chunks = 1
    while B * T // chunks * model.config.vocab_size > LOGITS and T % (2 * chunks) == 0:
        chunks *= 2

    def score_chunk(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        normed, targets = part
        logits = model.logits(normed)
        nll, _ = cross_entropy(logits, targets)
        return nll, jnp.argmax(logits, axis=-1) == targets

    parts = [
        jnp.moveaxis(x.reshape(B, chunks, T // chunks, *x.shape[2:]), 1, 0)
        for x in (normed_BTD, targets_BT)
    ]
    nll, greedy = jax.lax.map(score_chunk, tuple(parts))
    nll_BT, greedy_BT = (jnp.moveaxis(x, 0, 1).reshape(B, T) for x in (nll, greedy))
    return nll_BT, greedy_BT
