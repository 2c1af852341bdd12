"""What a position cannot see has no influence on it, not even a rounding error."""

import jax
import numpy as np
import pytest

from plt_jax import ModelConfig, Transformer
from tests.models import THREE_LOOPS, forward, random_params, small_config
from tests.tiers import slow_but

T = 80  # Beyond MIN_BLOCK, so attention runs in blocks.
LENGTHS = (10, 1, 58, 11)
SEGMENTS = np.repeat([7, 3, 7, 5], LENGTHS)[None]
TOKENS = np.arange(T)[None]  # Every position has a token, so an embedding, of its own.
DOCUMENTS = np.repeat(np.arange(4), LENGTHS)


def influence(config: ModelConfig, segment_ids) -> np.ndarray:
    """Largest derivative of (a random sum of) logits at t by the embedding at s, [T, T]."""
    weights = np.random.default_rng(0).normal(size=config.vocab_size).astype(np.float32)
    params = random_params(config)

    # One position at a time: on a CPU, jaxlib 0.10 compiles jacrev of an RMSNorm wrongly.
    @jax.jit
    @jax.grad
    def gradient(embedding, t):
        variables = {"params": {**params, "embedding": embedding}}
        return Transformer(config).apply(variables, TOKENS, segment_ids)[0, t] @ weights

    rows = [np.max(np.abs(gradient(params["embedding"], t)), axis=-1) for t in range(T)]
    return np.stack(rows)


MOSTLY_SLOW = slow_but([("plt", 3)], THREE_LOOPS, "compiles another scheme")


@pytest.mark.parametrize(("scheme", "count"), MOSTLY_SLOW)
def test_no_gradient_from_later_tokens_nor_other_documents(scheme, count):
    config = small_config(scheme, count, vocab_size=T, max_length=T)
    visible = np.tri(T, dtype=bool) & (DOCUMENTS[:, None] == DOCUMENTS)
    derivative = influence(config, SEGMENTS)
    assert np.all(derivative[~visible] == 0)
    assert np.all(derivative[visible] > 0)


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("scheme", ["plt", "clp", "loop_kv_share_window"])
def test_no_gradient_from_later_tokens_of_a_whole_row(scheme):
    config = small_config(scheme, 2, vocab_size=T, max_length=T, gate_input="hidden")
    visible = np.tri(T, dtype=bool)
    derivative = influence(config, None)
    assert np.all(derivative[~visible] == 0)
    assert np.all(derivative[visible] > 0)


@pytest.mark.parametrize(("scheme", "count"), MOSTLY_SLOW)
def test_packed_documents_equal_each_alone(scheme, count):
    config = small_config(scheme, count, vocab_size=T, max_length=T)
    params = random_params(config)
    # One document a row, at its start; what follows it there is later, so without influence.
    starts = np.cumsum([0, *LENGTHS[:-1]])
    alone = [np.roll(TOKENS[0], -start) for start in starts]
    tokens = np.stack([TOKENS[0], *alone])
    segment_ids = np.concatenate([SEGMENTS, np.zeros((len(LENGTHS), T), int)])
    packed, *rows = np.asarray(forward(config)(params, tokens, segment_ids))
    for row, start, length in zip(rows, starts, LENGTHS, strict=True):
        np.testing.assert_allclose(packed[start : start + length], row[:length], atol=1e-4)
