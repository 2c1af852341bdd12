"""Where parameters lie in tensors: layouts written out by hand, and reading in parts."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.interop.tensors import pieces_of, read_part, to_tensor, transposed
from tests.interop.checkpoints import exportable_configs
from tests.models import small_config

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (16, 16), (256, 3), (700, 47)])
def test_transposed(shape, dtype):
    x = RNG.normal(size=shape).astype(dtype)
    y = transposed(lambda start, stop: x[start:stop], shape)
    assert y.flags.c_contiguous and y.dtype == x.dtype
    np.testing.assert_array_equal(y, x.T)


def piece(name, **settings):
    (found,) = [
        piece for piece in pieces_of(small_config(**settings)) if piece.path[-1] == name
        and piece.layer in (None, 1)
    ]  # fmt: skip
    return found


D, N, K, H, F, V = 16, 4, 2, 4, 24, 31


def test_a_projection_to_heads():
    q = piece("q")
    assert q.names == ("model.layers.1.self_attn.q_proj.weight",)
    assert q.shape == (D, N, H) and q.tensor_shape == (N * H, D)
    tensor = RNG.normal(size=(N * H, D))
    part = read_part(lambda name, index: tensor[index], q, (slice(None),) * 3)
    for head in range(N):
        for h in range(H):
            np.testing.assert_array_equal(part[:, head, h], tensor[head * H + h])


def test_a_projection_from_heads():
    o = piece("o")
    assert o.shape == (N, H, D) and o.tensor_shape == (D, N * H)
    tensor = RNG.normal(size=(D, N * H))
    part = read_part(lambda name, index: tensor[index], o, (slice(None),) * 3)
    for head in range(N):
        for h in range(H):
            np.testing.assert_array_equal(part[head, h], tensor[:, head * H + h])


def test_what_is_as_it_is_and_what_is_flattened():
    assert piece("embedding").tensor_shape == (V, D)
    assert piece("head").tensor_shape == (V, D) and piece("head").shape == (D, V)
    assert piece("k_bias", qkv_bias=True).tensor_shape == (K * H,)
    assert piece("gate_weight", gate_input="query").tensor_shape == (N, H)
    hidden = piece("gate_weight", gate_input="hidden")
    assert hidden.shape == (D, N) and hidden.tensor_shape == (N, D)


@settings(max_examples=60)
@given(st.data(), exportable_configs())
def test_parts_are_parts_of_the_whole(data, config):
    """Any box of a parameter can be read by itself, and no more than its rows are."""
    piece = data.draw(st.sampled_from(pieces_of(config)))
    whole = RNG.normal(size=piece.shape)
    ones = whole if piece.by_expert else [whole]
    tensors = {name: to_tensor(one, piece) for name, one in zip(piece.names, ones, strict=True)}
    assert {tensor.shape for tensor in tensors.values()} == {piece.tensor_shape}

    index = tuple(
        slice(start, data.draw(st.integers(start + 1, size)))
        for size in piece.shape
        for start in [data.draw(st.integers(0, size - 1))]
    )
    part = read_part(lambda name, within: tensors[name][within], piece, index)
    np.testing.assert_array_equal(part, whole[index])
    everything = (slice(None),) * len(piece.shape)
    np.testing.assert_array_equal(
        read_part(lambda name, within: tensors[name][within], piece, everything), whole
    )
