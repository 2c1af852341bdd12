"""Products of a few rows with weights that have their outputs first, as fast as memory allows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from plt_jax.decoding.quantization import Quantized
from plt_jax.distributed.axes import mesh_is_active

# Above this number of rows a CPU is bound by arithmetic, and the fused sum is no better than a
# product. Processes that ran such sums on jax 0.10 crashed now and then, in XLA's threads.
MOST_SUMMED_ROWS = 256 if jax.__version_info__ >= (0, 12) else 0


LOW_STEPS = 254
"""How many steps of the low half of a number one step of the high half is."""


def linear(x: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """Multiplies x [..., D] with a decode weight; sums and returns float32.

    Args:
      weight: [N, D] or [2, F, D].

    Returns:
      [..., N] or [..., 2, F].
    """
    rows_MD, outputs = x.reshape(-1, x.shape[-1]), weight.shape[:-1]
    if not mesh_is_active():
        # CPUs have a fast product with a matrix alone; but a side that devices split cannot be
        # folded behind another without being gathered.
        weight = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), weight)
    if isinstance(weight, Quantized):
        forms = {"cpu": _eight_bits_on_cpu, "default": _converted_product}
    else:
        forms = {"cpu": _linear_on_cpu, "default": _product}
    out = jax.lax.platform_dependent(rows_MD, weight, **forms)
    return out.reshape(*x.shape[:-1], *outputs)


def _converted_product(x_MD: jax.Array, weight: Quantized) -> jax.Array:
    """A product with a weight in eight bits, which GPUs and TPUs convert while they read it."""
    return _product(x_MD, weight.values.astype(x_MD.dtype)) * weight.scales[..., 0]


def _eight_bits_on_cpu(x_MD: jax.Array, weight: Quantized) -> jax.Array:
    """A product with a weight in eight bits, as one of whole numbers.

    XLA writes out a weight that is converted for a product of floats on a CPU, but multiplies eight
    bits with eight bits as they are. A row becomes two rows in eight bits, the high and the low
    halves of its numbers: 16 bits for the range of the row, which is more than bfloat16 has for its
    largest numbers. Of few rows the second costs little, since reading weights takes longer
    (benchmarks/results/decode.md). The sums are exact.
    """
    wide_MD = x_MD.astype(jnp.float32)
    step_M1 = jnp.max(jnp.abs(wide_MD), axis=-1, keepdims=True) / 127
    steps_MD = wide_MD / jnp.maximum(step_M1, jnp.finfo(jnp.float32).tiny)
    high_MD = jnp.round(steps_MD)
    low_MD = jnp.round((steps_MD - high_MD) * LOW_STEPS)
    halves = jnp.stack([high_MD, low_MD]).astype(jnp.int8).reshape(-1, x_MD.shape[-1])
    # Behind the barrier they are made once, and not again for every output.
    halves = jax.lax.optimization_barrier(halves)
    sums = _product_on_cpu(halves, weight.values, jnp.int32)
    high, low = sums.astype(jnp.float32).reshape(2, len(x_MD), *sums.shape[1:])
    step = jnp.expand_dims(step_M1[:, 0], range(1, high.ndim))
    return (high + low / LOW_STEPS) * step * weight.scales[..., 0]


def _product(x_MD: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("MD,...D->M...", x_MD, weight, preferred_element_type=jnp.float32)


def _product_on_cpu(
    x_MD: jax.Array, weight: jax.Array, sums: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """As `_product`, with sums of any dtype.

    On a mesh a weight may be [2, F, D], since `linear` does not fold it there. It must be the first
    factor: as the second one XLA would write out a transposed copy of it, of all layers at the same
    time.
    """
    if weight.ndim == 2:
        return jnp.einsum("MD,ND->MN", x_MD, weight, preferred_element_type=sums)
    made_2FM = jnp.einsum("aFD,MD->aFM", weight, x_MD, preferred_element_type=sums)
    return jnp.moveaxis(made_2FM, -1, 0)


def _linear_on_cpu(x_MD: jax.Array, weight: jax.Array) -> jax.Array:
    """The fastest form that XLA has for few rows on a CPU (benchmarks/results/decode.md)."""
    rows = x_MD.shape[0]
    if x_MD.dtype == jnp.bfloat16:
        return on_two_rows(lambda x: _product_on_cpu(x, weight), x_MD, axis=0)
    if 1 < rows <= MOST_SUMMED_ROWS:
        # XLA fuses this sum into one pass over the weights for all rows, at the speed of memory;
        # its product takes 1.5 times as long or more (and so does the sum with x as the first
        # factor). What makes x must not be fused too: it would be computed again for every output.
        # And where a step uses a weight twice, as passes of a loop do, XLA would write one copy of
        # it for every row, and read that in both: behind one barrier with x its uses are not alike.
        x_MD, weight = jax.lax.optimization_barrier((x_MD, weight))
        x = jnp.expand_dims(x_MD, range(1, weight.ndim))
        return jnp.sum(weight[None] * x, axis=-1)
    return _product_on_cpu(x_MD, weight)


def on_two_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> jax.Array:
    """`product(x)`, of a doubled row where x has one: 10 times faster in bfloat16 on a CPU.

    Of one row XLA makes a product of vectors there, for which it converts all weights first.
    """
    if x.shape[axis] > 1:
        return product(x)
    # Behind the barrier the two rows are made once, and not again wherever they are read.
    doubled = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=axis))
    return jax.lax.slice_in_dim(product(doubled), 0, 1, axis=axis)
