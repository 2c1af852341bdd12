"""The loss of the head, computed in blocks of positions, against that of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.model import loss as module
from plt_jax.model.loss import block_size, head_loss
from tests.model.losses import arrays, plain, with_gradients


def check(found, expected, rtol=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    D=st.integers(1, 6),
    V=st.integers(2, 23),
    positions=st.integers(1, 30),
    z_loss=st.sampled_from([0.0, 0.3]),
)
def test_any_number_of_blocks_gives_the_loss_and_gradients_of_all_logits(
    B, T, D, V, positions, z_loss
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_POSITIONS", positions)
        patch.setattr(module, "BLOCK_LOGITS", dict.fromkeys(module.BLOCK_LOGITS, 1))
        inputs = arrays(B, T, D, V)
        found = with_gradients(head_loss, *inputs, z_loss=z_loss)
    check(found, with_gradients(plain, *inputs, z_loss=z_loss))


def test_gradients_grow_with_what_the_loss_is_multiplied_by():
    inputs = arrays(2, 5, 4, 11)
    found = with_gradients(head_loss, *inputs, z_loss=0.3, scale=-2.5)
    check(found, with_gradients(plain, *inputs, z_loss=0.3, scale=-2.5))


def test_large_logits_overflow_nowhere():
    states, head, *others = arrays(1, 6, 4, 11)
    inputs = (1e4 * states, head, *others)
    check(with_gradients(head_loss, *inputs), with_gradients(plain, *inputs))


def test_bfloat16_multiplies_rounded_gradients_and_sums_in_float32():
    inputs = arrays(4, 64, 32, 50, "bfloat16")
    sums, (states, head, weights) = with_gradients(head_loss, *inputs)
    exact_inputs = (inputs[0].astype(jnp.float32), *inputs[1:])
    expected, gradients = with_gradients(plain, *exact_inputs)
    assert (states.dtype, head.dtype) == (jnp.bfloat16, jnp.float32)
    check(sums, expected, rtol=1e-2)
    for one, other in zip((states, head, weights), gradients, strict=True):
        error = np.linalg.norm(np.asarray(one, np.float64) - np.asarray(other))
        assert error < 1e-2 * np.linalg.norm(other)


def test_no_array_holds_all_logits(monkeypatch):
    """Neither the program's peak nor what is kept between the passes grows with the logits."""
    monkeypatch.setattr(module, "MIN_POSITIONS", 8)
    monkeypatch.setattr(module, "BLOCK_LOGITS", dict.fromkeys(module.BLOCK_LOGITS, 1))
    inputs = arrays(4, 64, 8, 4096)

    def temporaries(loss):
        compiled = jax.jit(lambda *x: with_gradients(loss, *x)).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 4 * 64 * 4096
    assert temporaries(plain) > logits
    assert temporaries(head_loss) < logits / 4


@pytest.mark.parametrize(
    ("positions", "vocabulary", "expected"),
    [
        (1024, 4096, (1024, 1)),
        (8192, 131072, (512, 16)),
        (8193, 131072, (482, 17)),
        (100, 10**9, (100, 1)),
    ],
)
def test_blocks_hold_all_positions_and_few_logits(monkeypatch, positions, vocabulary, expected):
    monkeypatch.setattr(module, "BLOCK_LOGITS", dict.fromkeys(module.BLOCK_LOGITS, 2**26))
    assert block_size(positions, vocabulary) == expected
