"""The decode step's attention in one kernel on Hopper GPUs: its choice, and what is around it.

It does what `ops._qkv`, `model.attention.gate` and `step._attend_rows` do together, of which XLA
makes up to nine kernels a layer: norms, rotation, writes, attention and the gate's products are one
kernel, and merging the parts of the slots, with the gate's sigmoid and blend, is a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.config import ModelConfig
from plt_jax.config.model import PARTS
from plt_jax.decoding.cache import Cache, LayerCache, Slots, Stored
from plt_jax.decoding.mosaic_shape import ALIGNED, HEAD_WIDTHS, ROWS, Inputs, Shape
from plt_jax.decoding.ops import DECODE_OPS, joined_qkv
from plt_jax.decoding.placement import placement
from plt_jax.decoding.weights import Weights
from plt_jax.distributed.axes import mesh_is_active
from plt_jax.errors import InputError
from plt_jax.model.attention import blend, gate
from plt_jax.model.block import AnyAttend
from plt_jax.model.blockwise import Partial
from plt_jax.model.kernels import is_hopper
from plt_jax.model.layers import Rotation


def decode_kernel(config: ModelConfig, cache: Cache) -> Literal["xla", "mosaic"]:
    """The kernel of the decode step's attention: `config.decode_attention`, or XLA's for "auto".

    "auto" becomes "mosaic" where a measurement on a card says that it is faster; there is none yet.

    Raises:
      InputError: "mosaic" is configured, and the device, the model or the cache cannot have it.
    """
    if config.decode_attention != "mosaic":
        return "xla"
    obstacle = _obstacle(config, cache)
    if obstacle is not None:
        raise InputError(f"model.decode_attention is mosaic, but {obstacle}; set it to auto or xla")
    return "mosaic"


def _obstacle(config: ModelConfig, cache: Cache) -> str | None:
    """What keeps a decode step from using the kernel; None if it can."""
    loop, rows = config.loop, config.loop.count * (config.heads // config.kv_heads + 2)
    counts = [cache.slots_in(part).count for part in PARTS if config.layers_in(part)]
    if jax.__version_info__ < (0, 12):
        return f"jax is {jax.__version__}, and the kernel needs jax 0.12"
    if not is_hopper():
        return "it needs an NVIDIA GPU of compute capability 9 (H100, H200)"
    one_pass = loop.shifted and loop.later_attention in ("shared", "gated")
    if loop.count > 1 and not one_pass:
        return f"{loop.scheme} does not run its loops in one pass over one cache"
    if config.head_width not in HEAD_WIDTHS:
        return f"head_width is {config.head_width}, not {' or '.join(map(str, HEAD_WIDTHS))}"
    if rows > ROWS:
        return f"loops and query heads of a key/value head make {rows} rows, above {ROWS}"
    if config.qk_norm and config.qk_norm_over != "head":
        return f"qk_norm_over is {config.qk_norm_over}, not head"
    keys = cache.keys[0][0]
    if config.dtype != "bfloat16" or not _is_bfloat16(keys):
        return "model.dtype and the cache's dtype are not both bfloat16"
    if odd := [count for count in counts if count % ALIGNED]:
        return f"the cache has {odd[0]} slots, not a multiple of {ALIGNED} as it has on GPUs"
    if mesh_is_active() and placement(*keys.shape[:3]).slots:
        return "the mesh splits the slots of the cache over devices"
    return None


def _is_bfloat16(stored: Stored) -> bool:
    return isinstance(stored, jax.Array) and stored.dtype == jnp.bfloat16


def attend_joined(
    config: ModelConfig,
    weights: Weights,
    x_BRD: jax.Array,
    normed_BRD: jax.Array,
    rotation: Rotation,
    attend: AnyAttend[LayerCache],
) -> tuple[jax.Array, LayerCache]:
    """Calls `attend` (`attend_rows_fused`) with the joined projection of one row for each loop."""
    qkv_BRKxH = joined_qkv(config, weights, normed_BRD)
    # Gates of queries are made in the kernel; those of the layer's input read no queries.
    by_query = config.loop.gate_input == "query"
    gate_BNR = None if by_query else gate(config, weights, x_BRD, qkv_BRKxH)
    return attend(weights, qkv_BRKxH, rotation, gate_BNR)


FUSED_OPS = DECODE_OPS._replace(attention=attend_joined)
"""The products of `apply_block` with decode weights, and attention by the kernel."""


def attend_rows_fused(
    config: ModelConfig,
    slots: Slots,
    weights: Weights,
    qkv_BRKxH: jax.Array,
    rotation: Rotation,
    gate_BNR: jax.Array | None,
    cache: LayerCache,
    lengths_B: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """Attention of one row for each loop, in one layer: [B, N, R, H], and the cache after it.

    Under a mesh each device has the sequences and heads that it holds.

    Args:
      qkv_BRKxH: see `ops.joined_qkv`.
      gate_BNR: G-SWA's gates if they are made of the layer's input; None for others.
    """
    gated = slots.window > 0 and config.loop.count > 1
    by_query = gated and gate_BNR is None
    keys, values = cache.keys[0], cache.values[0]
    assert isinstance(keys, jax.Array) and isinstance(values, jax.Array)  # see `decode_kernel`
    inputs = Inputs(
        qkv_BRKxH,
        rotation.cos[:, 0, 0],
        rotation.sin[:, 0, 0],
        weights["qk_norm"][:, 0] if config.qk_norm else None,
        weights["gate_weight"] if by_query else None,
        lengths_B,
        keys,
        values,
    )
    given = inputs, gate_BNR if gated else None, weights["gate_bias"] if by_query else None
    attend = partial(_attend_on_device, config, slots)
    run = _shard_map(attend, *keys.shape[:3]) if mesh_is_active() else attend
    out_BNRH, keys, values = run(*given)
    return out_BNRH, LayerCache((keys,), (values,))


def _shard_map(attend: Callable, batch: int, kv_heads: int, slots: int) -> Callable:
    """`attend` on each device, with the sequences and heads that it holds."""
    where = placement(batch, kv_heads, slots)
    of_batch, of_heads = PartitionSpec(where.batch), PartitionSpec(where.heads)
    inputs = Inputs._make(
        (
            PartitionSpec(where.batch, None, where.heads),
            *(of_batch, of_batch),  # the rotation
            *(PartitionSpec(), of_heads),  # norms, and weights of gates
            of_batch,
            *(where.rows, where.rows),  # keys and values
        )
    )
    return jax.shard_map(
        attend,
        in_specs=(inputs, where.rows, of_heads),
        out_specs=(where.rows,) * 3,
        check_vma=False,  # it does not know what a kernel's outputs vary over
    )


def _attend_on_device(
    config: ModelConfig,
    slots: Slots,
    inputs: Inputs,
    gate_BNR: jax.Array | None,
    gate_bias_N: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel on what one device holds, and what merges its parts.

    Args:
      gate_BNR: gates of the layer's input; None for others.
      gate_bias_N: biases of gates of the queries; None for others.
    """
    from plt_jax.decoding.mosaic_kernel import decode_attention  # needs jax 0.12

    B, R, K, rows_of_loop, H = inputs.qkv_BRKxH.shape
    window = slots.window if R > 1 else 0
    shape = Shape(B, R, K, rows_of_loop - 2, H, slots.capacity, window)
    (sums, statistics), keys, values = decode_attention(shape, inputs, config.norm_epsilon)

    def queries(array: jax.Array) -> jax.Array:
        """The queries' rows [B, K, R, G, ...] of one part's [B, K, rows, ...]."""
        rows = array[:, :, : shape.rows].reshape(B, K, R, rows_of_loop, -1)
        return rows[:, :, :, : shape.group]

    largest, total, score = (statistics[:, :, :, index] for index in range(3))
    parts = [
        Partial(*(queries(array[:, :, part]) for array in (sums, total, largest)))
        for part in range(shape.parts)
    ]
    # One after another, and turned to [B, N, R, H] at the end, so that XLA makes one kernel of it.
    shared = reduce(Partial.merge, parts[: shape.shared_parts])
    out_BKRGH = shared.sum / shared.total
    if window:
        if gate_BNR is None:
            assert gate_bias_N is not None
            scores_BKRG = queries(score[:, :, -1])[..., 0]
            gate_BKRG = jax.nn.sigmoid(scores_BKRG + gate_bias_N.reshape(K, 1, -1))
        else:
            gate_BKRG = gate_BNR.reshape(B, K, -1, R).swapaxes(2, 3)
        # Loop 1 has no window. What its row left there is finite, and times zero.
        gate_BKRG = jnp.where(jnp.arange(R)[:, None] > 0, gate_BKRG, 1.0)
        out_BKRGH = blend(gate_BKRG, out_BKRGH, parts[-1].sum / parts[-1].total)
    out_BNRH = out_BKRGH.swapaxes(2, 3).reshape(B, -1, R, H)
    return out_BNRH.astype(inputs.qkv_BRKxH.dtype), keys, values
