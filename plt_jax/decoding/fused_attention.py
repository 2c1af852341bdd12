"""The decode step's attention in one kernel on Hopper GPUs: its choice, and what is around it.

It does what `ops._qkv`, `model.attention.gate` and `step._attend_rows` do together, of which XLA
makes up to nine kernels a layer: norms, rotation, writes, attention and the gate's products are one
kernel, and merging the parts of the slots, with the gate's sigmoid and blend, is a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import Cache, LayerCache, Slots, Stored
from plt_jax.decoding.ops import DECODE_OPS, joined_qkv
from plt_jax.decoding.placement import placement
from plt_jax.decoding.weights import Weights
from plt_jax.distributed.axes import mesh_is_active
from plt_jax.errors import InputError
from plt_jax.model.attention import gate
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
    slots = cache.slots.count
    if jax.__version_info__ < (0, 12):
        return f"jax is {jax.__version__}, and the kernel needs jax 0.12"
    if not is_hopper():
        return "it needs an NVIDIA GPU of compute capability 9 (H100, H200)"
    from plt_jax.decoding.mosaic_kernel import ALIGNED, HEAD_WIDTHS, ROWS

    one_pass = loop.shifted and loop.later_attention in ("shared", "gated")
    if loop.count > 1 and not one_pass:
        return f"{loop.scheme} does not run its loops in one pass over one cache"
    if config.head_width not in HEAD_WIDTHS:
        return f"head_width is {config.head_width}, not {' or '.join(map(str, HEAD_WIDTHS))}"
    if rows > ROWS:
        return f"loops and query heads of a key/value head make {rows} rows, above {ROWS}"
    keys = cache.keys[0][0]
    if config.dtype != "bfloat16" or not _is_bfloat16(keys):
        return "model.dtype and the cache's dtype are not both bfloat16"
    if slots % ALIGNED:
        return f"the cache has {slots} slots, not a multiple of {ALIGNED} as it has on GPUs"
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
    attend,
) -> tuple[jax.Array, LayerCache]:
    """Calls `attend` (`attend_rows_fused`) with the joined projection of one row for each loop."""
    qkv_BRKxH = joined_qkv(config, weights, normed_BRD)
    gate_BNR, by_query = None, config.loop.gate_input == "query"
    if config.loop.later_attention == "gated" and config.loop.count > 1 and not by_query:
        gate_BNR = gate(config, weights, x_BRD, qkv_BRKxH)
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
    given = {
        "qkv": qkv_BRKxH,
        "cos": rotation.cos[:, 0, 0],
        "sin": rotation.sin[:, 0, 0],
        "lengths": lengths_B,
        "norms": weights["qk_norm"][:, 0] if config.qk_norm else None,
        "gate_weight": weights["gate_weight"] if by_query else None,
        "gate_bias": weights["gate_bias"] if by_query else None,
        "gate": gate_BNR if gated else None,
        "keys": cache.keys[0],
        "values": cache.values[0],
    }
    attend = partial(_attend_on_device, config, slots)
    run = _shard_map(attend, given) if mesh_is_active() else attend
    out_BNRH, keys, values = run(given)
    return out_BNRH, LayerCache((keys,), (values,))


def _shard_map(attend: Callable, given: dict[str, jax.Array | None]) -> Callable:
    """`attend` on each device, with the sequences and heads that it holds."""
    keys = given["keys"]
    assert keys is not None
    where = placement(*keys.shape[:3])
    batch, heads = PartitionSpec(where.batch), PartitionSpec(where.heads)
    specs = {
        "qkv": PartitionSpec(where.batch, None, where.heads),
        **dict.fromkeys(("cos", "sin", "lengths"), batch),
        "norms": PartitionSpec(),
        **dict.fromkeys(("gate_weight", "gate_bias"), heads),
        **dict.fromkeys(("keys", "values", "gate"), where.rows),
    }
    return jax.shard_map(
        attend,
        in_specs=({name: specs[name] for name in given},),
        out_specs=(where.rows,) * 3,
        check_vma=False,  # it does not know what a kernel's outputs vary over
    )


def _attend_on_device(
    config: ModelConfig, slots: Slots, given: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel on what one device holds."""
    from plt_jax.decoding.mosaic_kernel import Shape, decode_attention  # needs jax 0.12

    qkv_BRKxH = given["qkv"]
    B, R, K, rows_of_loop, H = qkv_BRKxH.shape
    window = slots.window if R > 1 else 0
    shape = Shape(B, R, K, rows_of_loop - 2, H, slots.capacity, window)
    (sums, statistics), keys, values = decode_attention(
        shape,
        qkv_BRKxH,
        given["cos"],
        given["sin"],
        given["norms"],
        given["gate_weight"],
        given["lengths"],
        given["keys"],
        given["values"],
        config.norm_epsilon,
    )

    def queries(part: int, array: jax.Array) -> jax.Array:
        """The rows of queries [B, K, R, G, ...] of one part's [B, K, rows, ...]."""
        rows = array[:, :, part, : shape.rows]
        return rows.reshape(B, K, R, rows_of_loop, -1)[:, :, :, : shape.group]

    sums_of = partial(queries, array=sums)
    largest_of, total_of, gate_sum_of = (
        partial(queries, array=statistics[:, :, :, index]) for index in range(3)
    )
    # One after another, so that XLA makes one kernel of it.
    out, total, largest = sums_of(0), total_of(0), largest_of(0)
    for part in range(1, shape.shared_parts):
        new = jnp.maximum(largest, largest_of(part))
        old, more = jnp.exp2(largest - new), jnp.exp2(largest_of(part) - new)
        out = out * old + sums_of(part) * more
        total, largest = total * old + total_of(part) * more, new
    out /= total
    if window:
        windows = shape.shared_parts
        if given["gate"] is None:
            g = jax.nn.sigmoid(gate_sum_of(windows) + given["gate_bias"].reshape(K, 1, -1, 1))
        else:
            g = given["gate"].reshape(B, K, -1, R, 1).swapaxes(2, 3)
        g = jnp.where(jnp.arange(R)[:, None, None] > 0, g, 1.0)
        # Loop 1 has no window. What its row left there is finite, and times zero.
        out = g * out + (1.0 - g) * (sums_of(windows) / total_of(windows))
    out_BNRH = out.swapaxes(2, 3).reshape(B, -1, R, H).astype(qkv_BRKxH.dtype)
    return out_BNRH, keys, values
