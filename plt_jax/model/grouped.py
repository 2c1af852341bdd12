"""Grouped products: rows sorted by group, each group's rows times a weight of the group's own.

Axes: M rows, X groups (experts), D inputs, N outputs. All kernels compute `jax.lax.ragged_dot`,
which is the reference. Where XLA has no kernel for it, it multiplies every row with the weight of
every group.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp

from plt_jax.config import MoEConfig
from plt_jax.errors import InputError
from plt_jax.model.kernels import traced_platform

GroupedProduct = Callable[..., jax.Array]
"""`product(rows_MD, weight_XDN, sizes_X, outputs_first=False) -> [M, N]` in the dtype of the rows.

Rows after the last group give zero. With `outputs_first` the weight is [X, N, D].
"""

Kernel = Literal["ragged_dot", "blocks", "megablox", "tokamax"]

CPU_BLOCK = 64
ACCELERATOR_BLOCK = 256  # an estimate, not measured
MAX_TILE = 512


def choose_kernel(moe: MoEConfig) -> Kernel:
    """The kernel for the devices that the program is traced for; "auto" takes the fastest.

    Raises:
      InputError: those devices cannot run the configured kernel, or its package is missing.
    """
    available = available_kernels()
    if moe.grouped_product == "auto":
        return available[-1]
    if moe.grouped_product not in available:
        needed = {
            "megablox": "a TPU",
            "tokamax": "a GPU and the package (pip install 'plt_jax[tokamax]')",
        }
        raise InputError(
            f"model.moe.grouped_product is {moe.grouped_product}, which needs "
            f"{needed[moe.grouped_product]}; set it to auto or blocks"
        )
    return moe.grouped_product


def available_kernels() -> tuple[Kernel, ...]:
    """The kernels that the devices run which the program is traced for, the fastest last."""
    platform = traced_platform()
    if platform == "tpu":
        return "ragged_dot", "blocks", "megablox"
    if platform == "gpu" and importlib.util.find_spec("tokamax") is not None:
        return "ragged_dot", "blocks", "tokamax"
    return "ragged_dot", "blocks"


def ragged_dot(
    rows_MD: jax.Array, weight: jax.Array, sizes_X: jax.Array, outputs_first: bool = False
) -> jax.Array:
    """XLA's own grouped product."""
    weight_XDN = weight.swapaxes(1, 2) if outputs_first else weight
    return jax.lax.ragged_dot(rows_MD, weight_XDN, sizes_X)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocks(
    rows_MD: jax.Array, weight: jax.Array, sizes_X: jax.Array, outputs_first: bool = False
) -> jax.Array:
    """Multiplies blocks of rows of one group, in a loop on the device over the used blocks alone.

    It is the fastest kernel on CPUs (benchmarks/results/experts.md), and runs on every device.
    """
    return _multiply_blocks(rows_MD, weight, sizes_X, outputs_first)


def _blocks_forward(rows_MD, weight, sizes_X, outputs_first):
    return _multiply_blocks(rows_MD, weight, sizes_X, outputs_first), (rows_MD, weight, sizes_X)


def _blocks_backward(outputs_first, residuals, grad_MN):
    rows_MD, weight, sizes_X = residuals
    grad_rows_MD = _multiply_blocks(grad_MN, weight, sizes_X, not outputs_first)
    left, right = (grad_MN, rows_MD) if outputs_first else (rows_MD, grad_MN)
    return grad_rows_MD, _sum_blocks(left, right, sizes_X).astype(weight.dtype), None


blocks.defvjp(_blocks_forward, _blocks_backward)


def _multiply_blocks(
    rows_MD: jax.Array, weight: jax.Array, sizes_X: jax.Array, outputs_first: bool
) -> jax.Array:
    M = rows_MD.shape[0]
    block = _block_size(M, sizes_X.size)
    padded_MD = jnp.pad(rows_MD, ((0, block), (0, 0)))
    group_b, first_b, _, used = _block_table(sizes_X, M, block)

    def multiply(index: jax.Array, out_MN: jax.Array) -> jax.Array:
        rows_bD = jax.lax.dynamic_slice_in_dim(padded_MD, first_b[index], block)
        matrix = jax.lax.dynamic_index_in_dim(weight, group_b[index], keepdims=False)
        formula = "bD,ND->bN" if outputs_first else "bD,DN->bN"
        out_bN = jnp.einsum(formula, rows_bD, matrix, preferred_element_type=jnp.float32)
        # A block writes beyond the end of its group; the blocks after it overwrite that.
        return jax.lax.dynamic_update_slice_in_dim(
            out_MN, out_bN.astype(out_MN.dtype), first_b[index], axis=0
        )

    N = weight.shape[1 if outputs_first else 2]
    out_MN = jnp.zeros((M + block, N), rows_MD.dtype)
    return _zero_behind(jax.lax.fori_loop(0, used, multiply, out_MN)[:M], sizes_X)


def _sum_blocks(left_MD: jax.Array, right_MN: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """Sums left x right over the rows of each group, float32 [X, D, N]."""
    M = left_MD.shape[0]
    block = _block_size(M, sizes_X.size)
    left_MD, right_MN = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (left_MD, right_MN))
    group_b, first_b, count_b, used = _block_table(sizes_X, M, block)

    def add(index: jax.Array, out_XDN: jax.Array) -> jax.Array:
        left_bD = jax.lax.dynamic_slice_in_dim(left_MD, first_b[index], block)
        right_bN = jax.lax.dynamic_slice_in_dim(right_MN, first_b[index], block)
        right_bN = jnp.where((jnp.arange(block) < count_b[index])[:, None], right_bN, 0)
        product = jnp.einsum("bD,bN->DN", left_bD, right_bN, preferred_element_type=jnp.float32)
        group = group_b[index]
        so_far_DN = jax.lax.dynamic_index_in_dim(out_XDN, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out_XDN, so_far_DN + product, group, axis=0)

    shape = (sizes_X.shape[0], left_MD.shape[1], right_MN.shape[1])
    return jax.lax.fori_loop(0, used, add, jnp.zeros(shape, jnp.float32))


def _block_size(rows: int, groups: int) -> int:
    """Rows of a block: an even share of a group, up to where larger blocks are no faster."""
    largest = CPU_BLOCK if traced_platform() == "cpu" else ACCELERATOR_BLOCK
    return min(largest, -(-rows // (8 * groups)) * 8)


def _block_table(
    sizes_X: jax.Array, rows: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The group, first row and number of rows of each block, int32 [b], and the number in use."""
    blocks_X = -(-sizes_X // block)
    ends_X = jnp.cumsum(blocks_X)
    index_b = jnp.arange(rows // block + sizes_X.shape[0])
    group_b = jnp.searchsorted(ends_X, index_b, side="right")
    group_b = jnp.minimum(group_b, sizes_X.shape[0] - 1)
    before_b = (index_b - (ends_X - blocks_X)[group_b]) * block
    first_b = (jnp.cumsum(sizes_X) - sizes_X)[group_b] + before_b
    return group_b, first_b, sizes_X[group_b] - before_b, ends_X[-1]


def _zero_behind(rows_MD: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """Sets the rows after the last group to zero."""
    return jnp.where((jnp.arange(rows_MD.shape[0]) < jnp.sum(sizes_X))[:, None], rows_MD, 0)


def megablox(
    rows_MD: jax.Array,
    weight: jax.Array,
    sizes_X: jax.Array,
    outputs_first: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs, which skips tiles without rows of a group."""
    from jax.experimental.pallas.ops.tpu.megablox import ops

    M = rows_MD.shape[0]
    tile = min(MAX_TILE, -(-M // 128) * 128)
    D, N = (weight.shape[1], weight.shape[2])[:: -1 if outputs_first else 1]
    # The kernel takes whole tiles of rows. It leaves rows after the last group uninitialised, also
    # in the gradient, so they are set to zero on both sides.
    padded_MD = jnp.pad(_zero_behind(rows_MD, sizes_X), ((0, -M % tile), (0, 0)))
    out_MN = ops.gmm(
        padded_MD,
        weight,
        sizes_X.astype(jnp.int32),
        preferred_element_type=rows_MD.dtype,
        # Whole vectors, as the backward pass lays the tile of inputs over outputs and vice versa.
        tiling=(tile, *(min(MAX_TILE, -(-size // 128) * 128) for size in (D, N))),
        transpose_rhs=outputs_first,
        interpret=interpret,
    )
    return _zero_behind(out_MN[:M], sizes_X)


def tokamax(
    rows_MD: jax.Array, weight: jax.Array, sizes_X: jax.Array, outputs_first: bool = False
) -> jax.Array:
    """tokamax's kernels for GPUs, or XLA's product where it has none."""
    import tokamax  # pyright: ignore[reportMissingImports] - an extra

    contracted = (((1,), (2 if outputs_first else 1,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(contracted, (0,), (0,))
    rows_MD = _zero_behind(rows_MD, sizes_X)
    return _zero_behind(tokamax.ragged_dot_general(rows_MD, weight, sizes_X, numbers), sizes_X)


KERNELS: dict[Kernel, GroupedProduct] = {
    "ragged_dot": ragged_dot,
    "blocks": cast(GroupedProduct, blocks),
    "megablox": megablox,
    "tokamax": tokamax,
}


def grouped_product(moe: MoEConfig) -> GroupedProduct:
    """The product for the devices that the program is traced for.

    Raises:
      InputError: see `choose_kernel`.
    """
    return KERNELS[choose_kernel(moe)]
