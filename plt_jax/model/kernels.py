"""Fused attention over whole sequences: cuDNN on NVIDIA GPUs, splash attention (Pallas) on TPUs.

Neither keeps a [T, T] array of logits, and both skip blocks of keys that no query may see. Axes are
named as in attention.py, whose `causal_attention` and `windowed_attention` are the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from plt_jax.distributed.axes import on_each_device
from plt_jax.distributed.gpus import GPUS

Backend = Literal["xla", "cudnn", "splash"]

ATTENTION = "attention"
"""Name, for policies of rematerialisation, of what attention's backward pass needs of its forward
pass beside queries, keys and values."""

LANES = 128
"""Width of a TPU's vectors. The kernel's blocks of keys are multiples of it."""
MAX_BLOCK = 512
MIN_WINDOW_BLOCK = 256
"""Smallest block for windows: a window needs few keys, but every block has a fixed cost. This is an
estimate, not measured."""


def traced_platform() -> str:
    """The platform ("cpu", "gpu", "tpu") that the program is being traced for."""
    # A program that is compiled ahead of time is traced on a machine without its devices, under
    # their mesh.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def available_backend() -> Backend:
    """The fastest attention on the devices that the program is being traced for."""
    if traced_platform() == "tpu":
        return "splash"
    return "cudnn" if _nvidia_capability() >= (8, 0) else "xla"  # Ampere has fused attention


def is_hopper() -> bool:
    """Whether the program's GPUs are NVIDIA's of compute capability 9 (H100, H200), whose products
    have instructions of their own."""
    return _nvidia_capability()[0] == 9


def _nvidia_capability() -> tuple[int, int]:
    """The CUDA compute capability of the program's GPUs; (0, 0) on other devices."""
    if traced_platform() != "gpu":
        return 0, 0
    described = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.local_devices()[0]
    if described is not None and device.platform != described.platform:
        # Compiled ahead of time, for a card that distributed/gpus.py describes.
        named = (
            gpu for gpu in GPUS.values() if f"NVIDIA {gpu.name.upper()}" in described.device_kind
        )
        return next((gpu.capability for gpu in named), (0, 0))
    if "cuda" not in device.client.platform_version:  # a ROCm device is a "gpu", too
        return 0, 0
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def cudnn_attention(
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    documents_BT: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """cuDNN's fused attention, [B, N, T, H]; bfloat16 or float16, H a multiple of 8.

    Documents cost a [B, 1, T, T] mask, since `jax.nn.dot_product_attention` has no segment ids.
    Before jax 0.12 they also cost an unused gradient of that shape (jax-ml/jax#34685).
    """

    def attend(q_BNTH, k_BKTH, v_BKTH, documents_BT):
        T, mask = q_BNTH.shape[2], None
        # The backward pass takes even lengths only. No query of the sequence sees the added key.
        q_BNTH, k_BKTH, v_BKTH = (_pad_length(x, T % 2) for x in (q_BNTH, k_BKTH, v_BKTH))
        if documents_BT is not None:
            documents_BT = jnp.pad(documents_BT, ((0, 0), (0, T % 2)))
            mask = (documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
        out_BNTH = _call_cudnn(
            *(q_BNTH, k_BKTH, v_BKTH),
            mask=mask,
            # Needed with a window too, which bounds the left side alone (jax-ml/jax#39576).
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )
        return out_BNTH[:, :, :T]

    return on_each_device(attend)(q_BNTH, k_BKTH, v_BKTH, documents_BT)


def cudnn_masked_attention(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """cuDNN's fused attention to the keys that a mask allows, [B, N, T, H]; for inference alone.

    The mask is explicit, since cuDNN's causal masks align the first query with the first key, which
    is wrong for a chunk that follows others.
    """
    return _call_cudnn(q_BNTH, k_BKSH, v_BKSH, mask=mask_BTS[:, None])


def _call_cudnn(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, **settings) -> jax.Array:
    """`jax.nn.dot_product_attention` by cuDNN, with heads before positions, [B, N, T, H]."""
    out_BTNH = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSH)), implementation="cudnn", **settings
    )
    return out_BTNH.swapaxes(1, 2)


def splash_attention(
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    documents_BT: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Splash attention, [B, N, T, H], of any float dtype, length and head width.

    It calls `jax.experimental.pallas.ops.tpu.splash_attention`. Query heads share the keys and
    values of their group without copies.
    """

    def attend(q_BNTH, k_BKTH, v_BKTH, documents_BT):
        N, T = q_BNTH.shape[1:3]
        block, blocks = splash_blocks(T, window)
        shape = (block * blocks, block * blocks)
        mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), offset=0)
        documents = None if documents_BT is None else (documents_BT, documents_BT)
        return run_splash(splash_kernel(N, mask, block), q_BNTH, k_BKTH, v_BKTH, documents, shape)

    return on_each_device(attend)(q_BNTH, k_BKTH, v_BKTH, documents_BT)


def run_splash(
    kernel: Callable,
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    documents: tuple[jax.Array, jax.Array] | None,
    shape: tuple[int, int],
) -> jax.Array:
    """Runs a splash kernel over a batch, [B, N, T, H].

    Args:
      documents: document numbers of the queries [B, T] and of the keys [B, S].
      shape: the numbers of queries and keys that the kernel is made for. Padding at the ends must
        lie in the future of every real query.
    """
    T, H = q_BNTH.shape[2:]
    more_T, more_S = shape[0] - T, shape[1] - k_BKSH.shape[2]
    # The kernel does not scale the logits. Scaling in float32 keeps bfloat16 from rounding the
    # factor, which would be an error in the same direction everywhere.
    q_BNTH = (q_BNTH.astype(jnp.float32) / math.sqrt(H)).astype(q_BNTH.dtype)
    segments = None
    if documents is not None:
        q_documents, kv_documents = documents
        segments = SegmentIds(
            q=jnp.pad(q_documents, ((0, 0), (0, more_T))),
            kv=jnp.pad(kv_documents, ((0, 0), (0, more_S))),
        )
    k_BKSH, v_BKSH = _pad_length(k_BKSH, more_S), _pad_length(v_BKSH, more_S)
    return jax.vmap(kernel)(_pad_length(q_BNTH, more_T), k_BKSH, v_BKSH, segments)[:, :, :T]


def splash_blocks(length: int, window: int | None) -> tuple[int, int]:
    """The size of blocks of queries and keys, a multiple of 128, and the number in a sequence."""
    largest = MAX_BLOCK
    if window is not None:
        largest = min(max(_round_up(window, LANES), MIN_WINDOW_BLOCK), MAX_BLOCK)
    blocks = -(-length // largest)
    return _round_up(-(-length // blocks), LANES), blocks


def splash_kernel(heads: int, mask: Mask, block: int, length_shards: int = 1) -> Callable:
    """The kernel `(q_NTH, k_KSH, v_KSH, segments) -> [N, T, H]` of one sequence.

    Args:
      mask: the mask of queries and keys, the same for all heads.
      block: number of queries and of keys that are multiplied at once.
      length_shards: number of devices that the queries are spread over.
    """
    return make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=length_shards,
        residual_checkpoint_name=ATTENTION,
    )


def _pad_length(x_BNTH: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, padding), (0, 0)))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
