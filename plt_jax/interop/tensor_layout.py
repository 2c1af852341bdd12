"""The layouts of torch's Linear and of our parameters, and fast copies from one to the other."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from plt_jax.interop.tensors import UnstackedParameter

Index = tuple[slice, ...]
"""A box of an array: a slice for each axis."""


class Piece(NamedTuple):
    """What one tensor holds of a part of a parameter."""

    within: Index
    """The box of the tensor. Of axes that are flattened into one, the first is sliced."""
    shape: tuple[int, ...]
    """The shape of the box, in the parameter's layout and without the experts' axis."""
    rest: Index
    """The part of it that is wanted, where other flattened axes are sliced, too."""
    expert: int | None
    """The index in the part's first axis, which is the experts'."""


def pieces_of(parameter: UnstackedParameter, index: Index) -> dict[str, Piece]:
    """The pieces of a part of a parameter, by the names of their tensors.

    Args:
      index: the part, as a slice for each axis of `parameter.shape`.
    """
    names, experts = parameter.tensor_names, [None]
    if parameter.by_expert:
        names, index = names[index[0]], index[1:]
        experts = range(len(names))
    whole = parameter.expert_shape
    within, shape, rest = [], list(whole), list(index)
    for first, *inner in parameter.flattened_axes:
        start, stop, _ = index[first].indices(whole[first])
        stride = math.prod(whole[axis] for axis in inner)
        within.append(slice(start * stride, stop * stride))
        shape[first], rest[first] = stop - start, slice(None)
    return {
        name: Piece(tuple(within), tuple(shape), tuple(rest), expert)
        for name, expert in zip(names, experts, strict=True)
    }


def copy_piece(
    tensor: np.ndarray, piece: Piece, parameter: UnstackedParameter, part: np.ndarray
) -> bool:
    """Copies a piece of a tensor into a part of a parameter.

    Args:
      tensor: the piece's box of the tensor.
      part: the part, contiguous, whose dtype the numbers get.

    Returns:
      Whether all numbers are finite in that dtype.
    """
    out = part if piece.expert is None else part[piece.expert]
    whole = out if out.shape == piece.shape else np.empty(piece.shape, out.dtype)
    if parameter.input_axes:
        finite = _copy(tensor, whole.reshape(tensor.shape[::-1]).T)
    else:
        finite = _copy(tensor, whole.reshape(tensor.shape))
    if whole is not out:
        out[...] = whole[piece.rest]
        return bool(np.isfinite(out).all())
    return finite


def to_tensor(values: np.ndarray, parameter: UnstackedParameter) -> np.ndarray:
    """The tensor of a parameter.

    Args:
      values: the parameter's values, of shape `parameter.expert_shape`.

    Returns:
      An array of shape `parameter.tensor_shape` and the same dtype.
    """
    if not parameter.input_axes:
        return np.ascontiguousarray(values).reshape(parameter.tensor_shape)
    tensor = np.empty(parameter.tensor_shape, values.dtype)
    _copy(values.reshape(parameter.tensor_shape[::-1]), tensor.T)
    return tensor


_BLOCK_BYTES = 2**20
"""The bytes that a thread copies at a time. They are still in the core's cache when transposed."""
_STRIP = 64
"""Rows that are transposed at a time. They fill a few cache lines of the output."""
_POOL = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="transpose")


def _copy(source: np.ndarray, target: np.ndarray) -> bool:
    """Copies an array on all cores; `target` may be a transposed view.

    Returns:
      Whether all numbers are finite in the target's dtype.
    """
    # numpy copies dtypes that are not its own, such as bfloat16, one value at a time.
    bits = np.dtype(f"u{target.dtype.itemsize}")
    infinity = np.array(np.inf, target.dtype).view(bits) << 1  # without its sign
    row_bytes = max(source[:1].size, 1) * source.dtype.itemsize
    rows = max(_BLOCK_BYTES // row_bytes, 1)
    rows += -rows % _STRIP

    def copy(start: int) -> bool:
        with np.errstate(over="ignore"):  # what becomes infinite is found below
            block = source[start : start + rows].astype(target.dtype, copy=False).view(bits)
        for row in range(0, len(block), _STRIP):
            strip = block[row : row + _STRIP]
            target[start + row : start + row + len(strip)].view(bits)[...] = strip
        return bool((block << 1).max(initial=0) < infinity)

    return all(list(_POOL.map(copy, range(0, len(source), rows))))
