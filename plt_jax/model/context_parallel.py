"""Context parallelism: sequences whose positions are spread over the devices of a mesh axis.

Each of C devices holds T/C consecutive positions. Between devices travel: the one state of the
shift, the last W - 1 keys of a window, and for causal attention every key (gathered) and half of
the queries. Queries travel since later positions see more keys: device i takes its own first half
and the second half of device C - 1 - i, its mirror image, and so all devices have the same work.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import CausalMask, LocalMask
from jax.sharding import NamedSharding, PartitionSpec

from plt_jax.distributed.axes import (
    batch_axes,
    current_axes,
    devices_along,
    on_each_device,
    sharded_axes,
)
from plt_jax.model.blockwise import MASKED, Partial, partial_attention, windowed_attention
from plt_jax.model.kernels import Backend, run_splash, splash_blocks, splash_kernel

QUERY_BLOCK, KEY_BLOCK = 512, 512
"""Block sizes of causal attention in plain XLA: logits take QUERY_BLOCK x KEY_BLOCK per head."""

NO_DOCUMENT = -1
"""The document number of queries that only fill up a block."""


def shift_right(x_BTD: jax.Array) -> jax.Array:
    """Moves positions one to the right, across the devices of a sequence; zero comes first."""
    axes = sharded_axes("length")
    if not axes:
        return _shift(x_BTD, jnp.zeros_like(x_BTD[:, :1]))
    spec = PartitionSpec(batch_axes(x_BTD.shape[0]), axes)
    run = jax.shard_map(
        lambda x: _shift(x, before(x, 1, axes, axis=1)), in_specs=spec, out_specs=spec
    )
    return run(x_BTD)


def _shift(x_BTD: jax.Array, first_B1D: jax.Array) -> jax.Array:
    return jnp.concatenate([first_B1D, x_BTD[:, :-1]], axis=1)


def spread_attention(
    backend: Backend,
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    documents_BT: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """`attention.sequence_attention` over sequences that a mesh axis spreads over devices."""
    axes = sharded_axes("length")
    if documents_BT is None:
        documents_BT = jnp.zeros((q_BNTH.shape[0], q_BNTH.shape[2]), jnp.int32)
    inputs = q_BNTH, k_BKTH, v_BKTH, documents_BT
    if window is not None:
        attend = _splash_window if backend == "splash" else _window
        return on_each_device(partial(attend, axes, window))(*inputs)
    if backend != "splash":
        return on_each_device(partial(_causal, axes))(*inputs)
    T, devices = q_BNTH.shape[2], devices_along(axes)
    heads = q_BNTH.shape[1] // devices_along(current_axes("heads"))
    block, rows = mirrored_rows(T, devices)
    mask = CausalMask((len(rows), -(-T // block) * block))
    mask.q_sequence = rows
    kernel = splash_kernel(heads, mask, block, devices)
    mesh = jax.sharding.get_abstract_mesh()
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axes)))
    return on_each_device(partial(_splash_causal, axes, mask.shape), specs)(*inputs, kernel)


def before(x: jax.Array, count: int, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The `count` positions before a device's own; zeros before the first of the sequence."""
    length, devices = x.shape[axis], jax.lax.axis_size(axes)
    pieces, missing, away = [], count, 1
    while missing > 0:
        size = min(missing, length)
        tail = jax.lax.slice_in_dim(x, length - size, length, axis=axis)
        if away < devices:
            steps = [(source, source + away) for source in range(devices - away)]
            pieces.append(jax.lax.ppermute(tail, axes, steps))  # who gets none has zeros
        else:
            pieces.append(jnp.zeros_like(tail))
        missing, away = missing - size, away + 1
    return jnp.concatenate(pieces[::-1], axis=axis)


def with_halo(
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    documents_BT: jax.Array,
    window: int,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values and document numbers, with those of the window - 1 positions before them."""
    if window == 1:
        return k_BKTH, v_BKTH, documents_BT
    halo = partial(before, count=window - 1, axes=axes)
    # Numbers count from 1 while they travel, to differ from the zeros before the first position.
    numbers = jnp.concatenate([halo(documents_BT + 1, axis=1), documents_BT + 1], axis=1)
    k, v = (jnp.concatenate([halo(x, axis=2), x], axis=2) for x in (k_BKTH, v_BKTH))
    return k, v, numbers - 1


def _window(axes, window, q_BNTH, k_BKTH, v_BKTH, documents_BT):
    """Windowed attention of one device's queries, in plain XLA."""
    k, v, documents = with_halo(k_BKTH, v_BKTH, documents_BT, window, axes)
    # The positions before get queries too, whose outputs are dropped.
    q = jnp.pad(q_BNTH, ((0, 0), (0, 0), (window - 1, 0), (0, 0)))
    return windowed_attention(q, k, v, documents, window)[:, :, window - 1 :]


def _splash_window(axes, window, q_BNTH, k_BKTH, v_BKTH, documents_BT):
    """Windowed attention of one device's queries, by splash."""
    k, v, documents = with_halo(k_BKTH, v_BKTH, documents_BT, window, axes)
    N, T = q_BNTH.shape[1:3]
    block, blocks = splash_blocks(T, window)
    shape = (block * blocks, -(-(block * blocks + window - 1) // block) * block)
    mask = LocalMask(shape, (window - 1, 0), offset=window - 1)
    return run_splash(splash_kernel(N, mask, block), q_BNTH, k, v, (documents_BT, documents), shape)


def swap_halves(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """Each device's own first half, and the second half of its mirror image; its own inverse."""
    devices, half = jax.lax.axis_size(axes), x.shape[axis] // 2
    first, second = jnp.split(x, [half], axis=axis)
    mirror = [(source, devices - 1 - source) for source in range(devices)]
    return jnp.concatenate([first, jax.lax.ppermute(second, axes, mirror)], axis=axis)


def gather(axes: tuple[str, ...], k_BKTH, v_BKTH, documents_BT):
    """Keys, values and documents of the whole sequence."""
    return tuple(
        jax.lax.all_gather(x, axes, axis=axis, tiled=True)
        for x, axis in ((k_BKTH, 2), (v_BKTH, 2), (documents_BT, 1))
    )


def _causal(axes, q_BNTH, k_BKTH, v_BKTH, documents_BT):
    """Causal attention of one device's queries, in plain XLA."""
    k_BKSH, v_BKSH, documents_BS = gather(axes, k_BKTH, v_BKTH, documents_BT)
    q_BNTH, documents_BT = swap_halves(q_BNTH, axes, 2), swap_halves(documents_BT, axes, 1)
    me, devices, T = jax.lax.axis_index(axes), jax.lax.axis_size(axes), q_BNTH.shape[2]
    half, mirror = T // 2, devices - 1 - me
    outs = [
        attend_from(q_BNTH[:, :, part], k_BKSH, v_BKSH, documents_BT[:, part], documents_BS, start)
        for part, start in ((slice(half), me * T), (slice(half, T), mirror * T + half))
        if part.stop > (part.start or 0)
    ]
    return swap_halves(jnp.concatenate(outs, axis=2), axes, 2)


def attend_from(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    documents_BT: jax.Array,
    documents_BS: jax.Array,
    start: jax.Array | int,
) -> jax.Array:
    """Causal attention of queries at positions start, start + 1, ... to keys at 0, 1, ...

    Blocks of keys after a block of queries are skipped, although only the device knows where they
    begin. The backward pass recomputes a block of queries, so memory grows with the block alone.
    """
    B, N, T, H = q_BNTH.shape
    S = k_BKSH.shape[2]
    size, width = min(QUERY_BLOCK, T), min(KEY_BLOCK, S)
    q = _blocks(q_BNTH, size, axis=2)
    q_documents = _blocks(documents_BT, size, axis=1, fill=NO_DOCUMENT)
    keys = _blocks(k_BKSH, width, 2), _blocks(v_BKSH, width, 2), _blocks(documents_BS, width, 1)
    key_starts = jnp.arange(len(keys[0])) * width

    @jax.checkpoint
    def attend_block(inputs):
        q_BNTH, documents_BT, first = inputs
        positions_T = first + jnp.arange(size)

        def add(so_far: Partial, block):
            k, v, documents, key_start = block

            def more():
                slots = key_start + jnp.arange(width)
                mask = (slots <= positions_T[:, None]) & (slots < S)
                mask = mask & (documents_BT[:, :, None] == documents[:, None, :])
                return so_far.merge(partial_attention(q_BNTH, k, v, mask))

            return jax.lax.cond(key_start < first + size, more, lambda: so_far), None

        K = k_BKSH.shape[1]
        empty = jnp.zeros((B, K, N // K, size, H)), jnp.zeros((B, K, N // K, size, 1))
        nothing = Partial(*empty, jnp.full_like(empty[1], MASKED))
        return jax.lax.scan(add, nothing, (*keys, key_starts))[0].heads(q_BNTH)

    firsts = start + jnp.arange(len(q)) * size
    out = jax.lax.map(attend_block, (q, q_documents, firsts))
    return jnp.moveaxis(out, 0, 2).reshape(B, N, -1, H)[:, :, :T]


def _blocks(x: jax.Array, size: int, axis: int, fill: int = 0) -> jax.Array:
    """Cuts an axis into blocks, which become the first axis; fills up the last block."""
    length = x.shape[axis]
    count = -(-length // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - length)
    x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def mirrored_rows(length: int, devices: int) -> tuple[int, np.ndarray]:
    """The positions of a sequence after `swap_halves`, for splash.

    Returns:
      The block size, and the position of each row, int32: for each device both of its halves, each
      filled up to whole blocks by repeating its last position.
    """
    each = length // devices
    half = each // 2
    longer = each - half
    block, blocks = splash_blocks(longer, None)
    rows = []
    for device in range(devices):
        mirror = devices - 1 - device
        for start, count in ((device * each, half), (mirror * each + half, longer)):
            offsets = np.minimum(np.arange(block * blocks), max(count - 1, 0))
            rows.append(start + offsets)
    return block, np.concatenate(rows).astype(np.int32)


def _splash_causal(axes, shape, q_BNTH, k_BKTH, v_BKTH, documents_BT, kernel):
    """Causal attention of one device's queries by splash; `kernel` is made for all devices."""
    k_BKSH, v_BKSH, documents_BS = gather(axes, k_BKTH, v_BKTH, documents_BT)
    q_BNTH, documents_BT = swap_halves(q_BNTH, axes, 2), swap_halves(documents_BT, axes, 1)
    T, each = q_BNTH.shape[2], shape[0] // jax.lax.axis_size(axes)
    half, room = T // 2, each // 2

    def filled(x: jax.Array, axis: int) -> jax.Array:
        """Fills up both halves as `mirrored_rows` does."""
        parts = []
        for part in jnp.split(x, [half], axis=axis):
            padding = [(0, 0)] * x.ndim
            padding[axis] = (0, room - part.shape[axis])
            parts.append(jnp.pad(part, padding, mode="edge" if part.shape[axis] else "constant"))
        return jnp.concatenate(parts, axis=axis)

    out = run_splash(
        kernel,
        filled(q_BNTH, 2),
        k_BKSH,
        v_BKSH,
        (filled(documents_BT, 1), documents_BS),
        (each, shape[1]),
    )
    out = jnp.concatenate([out[:, :, :half], out[:, :, room : room + T - half]], axis=2)
    return swap_halves(out, axes, 2)
