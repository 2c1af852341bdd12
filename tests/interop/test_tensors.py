"""The layouts of parameters and tensors, written out by hand, and reading tensors in parts."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.interop import tensor_layout
from plt_jax.interop.tensor_layout import copy_piece, pieces_of, to_tensor
from plt_jax.interop.tensors import unstacked_parameters
from tests.interop.checkpoints import exportable_configs
from tests.models import small_config

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (16, 16), (700, 47), (3, 70000)])
def test_transpose(shape, dtype, monkeypatch):
    monkeypatch.setattr(tensor_layout, "_BLOCK_BYTES", 2**12)
    x = RNG.normal(size=shape).astype(dtype)
    head = parameter("head")._replace(shape=shape)
    y = to_tensor(x, head)
    assert y.flags.c_contiguous and y.dtype == x.dtype
    np.testing.assert_array_equal(y, x.T)
    back = np.zeros(shape, dtype)
    (piece,) = pieces_of(head, (slice(None), slice(None))).values()
    assert copy_piece(y, piece, head, back)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", ["q", "embedding"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_found_anywhere(dtype, name, number, monkeypatch):
    monkeypatch.setattr(tensor_layout, "_BLOCK_BYTES", 2**8)
    found = parameter(name)
    whole = (slice(None),) * len(found.shape)
    (piece,) = pieces_of(found, whole).values()
    part, tensor = np.zeros(found.shape, dtype), RNG.normal(size=found.tensor_shape)
    assert copy_piece(tensor.astype(np.float32), piece, found, part)
    tensor[tuple(RNG.integers(0, found.tensor_shape))] = number
    # The largest finite number of float32 is beyond those of float16.
    finite = number == 3e38 and dtype != np.float16
    assert copy_piece(tensor.astype(np.float32), piece, found, part) == finite


def parameter(name, **settings):
    (found,) = [
        parameter
        for parameter in unstacked_parameters(small_config(**settings))
        if parameter.path[-1] == name and parameter.layer in (None, 1)
    ]
    return found


def read_part(tensors, parameter, index):
    """A part of a parameter, from its tensors by name."""
    part = np.empty(np.empty(parameter.shape)[index].shape)
    for name, piece in pieces_of(parameter, index).items():
        assert copy_piece(tensors[name][piece.within], piece, parameter, part)
    return part


D, N, K, H, F, V = 16, 4, 2, 4, 24, 31


def test_a_projection_to_heads():
    q = parameter("q")
    assert q.tensor_names == ("model.layers.1.self_attn.q_proj.weight",)
    assert q.shape == (D, N, H) and q.tensor_shape == (N * H, D)
    tensor = RNG.normal(size=(N * H, D))
    part = read_part({q.tensor_names[0]: tensor}, q, (slice(None),) * 3)
    for head in range(N):
        for h in range(H):
            np.testing.assert_array_equal(part[:, head, h], tensor[head * H + h])


def test_a_projection_from_heads():
    o = parameter("o")
    assert o.shape == (N, H, D) and o.tensor_shape == (D, N * H)
    tensor = RNG.normal(size=(D, N * H))
    part = read_part({o.tensor_names[0]: tensor}, o, (slice(None),) * 3)
    for head in range(N):
        for h in range(H):
            np.testing.assert_array_equal(part[head, h], tensor[:, head * H + h])


def test_tensors_of_the_same_shape_and_flattened_tensors():
    assert parameter("embedding").tensor_shape == (V, D)
    assert parameter("head").tensor_shape == (V, D) and parameter("head").shape == (D, V)
    assert parameter("k_bias", qkv_bias=True).tensor_shape == (K * H,)
    assert parameter("gate_weight", gate_input="query").tensor_shape == (N, H)
    hidden = parameter("gate_weight", gate_input="hidden")
    assert hidden.shape == (D, N) and hidden.tensor_shape == (N, D)


@settings(max_examples=60)
@given(st.data(), exportable_configs())
def test_parts_are_parts_of_the_whole(data, config):
    """Any box of a parameter can be read on its own."""
    parameter = data.draw(st.sampled_from(unstacked_parameters(config)))
    whole = RNG.normal(size=parameter.shape)
    ones = whole if parameter.by_expert else [whole]
    tensors = {
        name: to_tensor(one, parameter)
        for name, one in zip(parameter.tensor_names, ones, strict=True)
    }
    assert {tensor.shape for tensor in tensors.values()} == {parameter.tensor_shape}

    index = tuple(
        slice(start, data.draw(st.integers(start + 1, size)))
        for size in parameter.shape
        for start in [data.draw(st.integers(0, size - 1))]
    )
    part = read_part(tensors, parameter, index)
    np.testing.assert_array_equal(part, whole[index])
    everything = (slice(None),) * len(parameter.shape)
    np.testing.assert_array_equal(read_part(tensors, parameter, everything), whole)
