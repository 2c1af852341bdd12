"""The layouts of torch's Linear and of our parameters, and fast transposition between them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from plt_jax.interop.tensors import UnstackedParameter


def read_part(
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    parameter: UnstackedParameter,
    index: tuple[slice, ...],
) -> np.ndarray:
    """A part of a parameter, in the parameter's layout.

    Args:
      read: returns a part of a tensor, given the tensor's name and a slice for each of its axes.
      index: the part, as a slice for each axis of `parameter.shape`.
    """
    names = parameter.tensor_names
    if parameter.by_expert:
        names, index = names[index[0]], index[1:]
    whole = parameter.expert_shape
    # Of axes that are flattened into one, the first is sliced by `read`, and the others afterwards.
    tensor_index, read_shape, rest = [], list(whole), list(index)
    for first, *inner in parameter.flattened_axes:
        start, stop, _ = index[first].indices(whole[first])
        stride = math.prod(whole[axis] for axis in inner)
        tensor_index.append(slice(start * stride, stop * stride))
        read_shape[first], rest[first] = stop - start, slice(None)

    def part(name: str) -> np.ndarray:
        if not parameter.input_axes:
            values = read(name, tuple(tensor_index))
        else:
            rows, columns = tensor_index

            def read_rows(start: int, stop: int) -> np.ndarray:
                return read(name, (slice(rows.start + start, rows.start + stop), columns))

            sizes = (rows.stop - rows.start, columns.stop - columns.start)
            values = transpose(read_rows, sizes)
        return values.reshape(read_shape)[tuple(rest)]

    return np.stack([part(name) for name in names]) if parameter.by_expert else part(names[0])


def to_tensor(values: np.ndarray, parameter: UnstackedParameter) -> np.ndarray:
    """The tensor of a parameter.

    Args:
      values: the parameter's values, of shape `parameter.expert_shape`.

    Returns:
      An array of shape `parameter.tensor_shape` and the same dtype.
    """
    if not parameter.input_axes:
        return np.ascontiguousarray(values).reshape(parameter.tensor_shape)
    outputs, inputs = parameter.tensor_shape
    matrix = values.reshape(inputs, outputs)
    return transpose(lambda start, stop: matrix[start:stop], matrix.shape)


_BLOCK = 256  # Rows that are read at a time. They are still in the core's cache when transposed.
_STRIP = 16  # Rows that are transposed at a time. They fill one or two cache lines of the output.
_POOL = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="transpose")


def transpose(rows: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The transpose of a matrix that is read in blocks of rows, on all cores.

    Args:
      rows: `rows(start, stop)` returns the matrix's rows from `start` to before `stop`.
      shape: the matrix's shape.
    """
    first = rows(0, min(_BLOCK, shape[0]))
    out = np.empty(shape[::-1], first.dtype)
    # numpy copies dtypes that are not its own, such as bfloat16, one value at a time.
    bits = np.dtype(f"u{first.dtype.itemsize}")
    target = out.view(bits)

    def copy(start: int) -> None:
        block = first if start == 0 else rows(start, min(start + _BLOCK, shape[0]))
        for row in range(0, len(block), _STRIP):
            strip = block[row : row + _STRIP].view(bits)
            target[:, start + row : start + row + len(strip)] = strip.T

    list(_POOL.map(copy, range(0, shape[0], _BLOCK)))
    return out
