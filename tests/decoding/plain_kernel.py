"""What the decode step's Mosaic GPU kernel does, in plain JAX: for jax before 0.12, and for meshes,
which Pallas' interpreter cannot simulate."""

import jax
import jax.numpy as jnp

from plt_jax.decoding.cache import Slots, write
from plt_jax.decoding.mosaic_shape import ROWS, Inputs, Shape
from plt_jax.model.blockwise import MASKED
from plt_jax.model.layers import Rotation, rms_norm, rotate


def decode_attention(shape: Shape, inputs: Inputs, epsilon: float):
    """See `mosaic_kernel.decode_attention`. All shared slots are in the first part."""
    given_BKxRH = inputs.qkv_BRKxH.transpose(0, 2, 3, 1, 4)
    qk, v_BKRH = given_BKxRH[:, :, :-1], given_BKxRH[:, :, -1]
    if inputs.norms_xH is not None:
        qk = rms_norm(qk, inputs.norms_xH[:, None], epsilon)
    qk = rotate(qk, Rotation(*(x[:, None, None, None] for x in (inputs.cos_Bh, inputs.sin_Bh))))
    q_BKGRH, k_BKRH = qk[:, :, :-1], qk[:, :, -1]

    slots = Slots(shape.capacity, shape.window, inputs.keys.shape[2])
    positions_B, slot_S = inputs.lengths_B, jnp.arange(slots.count)
    written = shape.loops if shape.window else 1
    at_BR = jnp.stack([slots.of(loop, positions_B) for loop in range(written)], axis=1)
    keys = write(inputs.keys, k_BKRH[:, :, :written], at_BR)
    values = write(inputs.values, v_BKRH[:, :, :written], at_BR)
    q, k, v = (x.astype(jnp.float32) for x in (q_BKGRH, keys, values))
    logits = jnp.einsum("BKGRH,BKSH->BKGRS", q / shape.head_width**0.5, k)
    masks = [slot_S <= positions_B[:, None, None]]
    masks += [jnp.zeros_like(masks[0])] * (shape.shared_parts - 1)
    if shape.window:
        masks.append(slots.seen(range(shape.loops), positions_B, slot_S))
    sums, statistics = [], []
    for mask_BRS in masks:
        seen = jnp.where(mask_BRS[:, None, None], logits, MASKED)
        largest = jnp.max(seen, axis=-1, keepdims=True)
        powers = jnp.exp(seen - largest)
        score = jnp.zeros_like(largest)
        if inputs.gate_NH is not None:
            weights = inputs.gate_NH.reshape(1, shape.kv_heads, -1, 1, shape.head_width)
            score = jnp.sum(q * weights, axis=-1, keepdims=True)
        sums.append(_rows(shape, jnp.einsum("BKGRS,BKSH->BKGRH", powers, v)))
        total = jnp.sum(powers, axis=-1, keepdims=True)
        of_rows = [_rows(shape, x)[..., 0] for x in (largest, total, score)]
        padding = ((0, 0), (0, 0), (0, 0), (0, ROWS - of_rows[0].shape[-1]))
        statistics.append(jnp.pad(jnp.stack(of_rows, axis=2), padding))
    return (jnp.stack(sums, axis=2), jnp.stack(statistics, axis=2)), keys, values


def _rows(shape: Shape, x_BKGRx: jax.Array) -> jax.Array:
    """Numbers of queries among the rows of a program, [B, K, rows, ...]; zero in other rows."""
    x_BKRGx = jnp.pad(x_BKGRx.swapaxes(2, 3), ((0, 0), (0, 0), (0, 0), (0, 2), (0, 0)))
    rows = x_BKRGx.reshape(*x_BKRGx.shape[:2], shape.rows, -1)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -shape.rows % 8), (0, 0)))
