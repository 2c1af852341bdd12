"""Products of a few rows with weights that have their outputs first, as fast as memory allows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from plt_jax.distributed.axes import mesh_is_active

# Above this number of rows a CPU is bound by arithmetic, and the fused sum is no better than a
# product. Processes that ran such sums on jax 0.10 crashed now and then, in XLA's threads.
MOST_SUMMED_ROWS = 256 if jax.__version_info__ >= (0, 12) else 0


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
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
        weight = weight.reshape(-1, weight.shape[-1])
    out = jax.lax.platform_dependent(rows_MD, weight, cpu=_linear_on_cpu, default=_product)
    return out.reshape(*x.shape[:-1], *outputs)


def _product(x_MD: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("MD,...D->M...", x_MD, weight, preferred_element_type=jnp.float32)


def _linear_on_cpu(x_MD: jax.Array, weight: jax.Array) -> jax.Array:
    """The fastest form that XLA has for few rows on a CPU (benchmarks/results/decode.md)."""
    rows = x_MD.shape[0]
    if x_MD.dtype == jnp.bfloat16:
        return on_two_rows(lambda x: _product(x, weight), x_MD, axis=0)
    if 1 < rows <= MOST_SUMMED_ROWS:
        # XLA fuses this sum into one pass over the weights for all rows, at the speed of memory;
        # its product takes 1.5 times as long or more (and so does the sum with x as the first
        # factor). What makes x must not be fused too: it would be computed again for every output.
        # And where a step uses a weight twice, as passes of a loop do, XLA would write one copy of
        # it for every row, and read that in both: behind one barrier with x its uses are not alike.
        x_MD, weight = jax.lax.optimization_barrier((x_MD, weight))
        x = jnp.expand_dims(x_MD, range(1, weight.ndim))
        return jnp.sum(weight[None] * x, axis=-1)
    return _product(x_MD, weight)


def on_two_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> jax.Array:
    """`product(x)`, of a doubled row where x has one: 10 times faster in bfloat16 on a CPU.

    Of one row XLA makes a product of vectors there, for which it converts all weights first.
    """
    if x.shape[axis] > 1:
        return product(x)
    # Behind the barrier the two rows are made once, and not again wherever they are read.
    doubled = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=axis))
    return jax.lax.slice_in_dim(product(doubled), 0, 1, axis=axis)
