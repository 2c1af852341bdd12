"""Specifications of NVIDIA GPUs: peak arithmetic, memory, and what XLA's compiler asks of a card.

Sources: [N] NVIDIA's data sheets and architecture papers of A100, H100, H200 and B200; dense
figures (half of those quoted with sparsity), of the SXM cards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from plt_jax.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    flops: float
    """Peak bfloat16 FLOP/s; a multiplication with an addition counts as two."""
    hbm_bytes: int
    """Bytes of memory."""
    hbm_bandwidth: float
    """Bytes/s."""
    l2_bytes: int
    """Bytes of the level 2 cache."""
    cores: int
    """Number of streaming multiprocessors."""
    clock_ghz: float
    shared_bytes: int
    """Bytes of shared memory of one streaming multiprocessor."""
    capability: tuple[int, int]
    """CUDA compute capability."""

    def describe(self) -> str:
        """The card as XLA's compiler wants it described (a GpuTargetConfigProto as text)."""
        major, minor = self.capability
        # Programs of sm_90a and sm_100a may use what only these cards have.
        extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.shared_bytes - 1024}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.hbm_bandwidth)}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.hbm_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {self.name.upper()}"
"""


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (  # all figures from [N]
        Gpu("a100", 312e12, 80 * 10**9, 2039e9, 40 << 20, 108, 1.41, 164 << 10, (8, 0)),
        Gpu("h100", 989e12, 80 * 10**9, 3352e9, 50 << 20, 132, 1.98, 228 << 10, (9, 0)),
        Gpu("h200", 989e12, 141 * 10**9, 4800e9, 50 << 20, 132, 1.98, 228 << 10, (9, 0)),
        Gpu("b200", 2250e12, 180 * 10**9, 7700e9, 126 << 20, 148, 1.965, 228 << 10, (10, 0)),
    )
}


class GpuTopology(NamedTuple):
    """Cards of one kind in one host."""

    gpu: Gpu
    devices: int


def names_gpus(topology: str) -> bool:
    """Whether a topology is one of GPUs, not of TPUs."""
    return topology.partition(":")[0] in GPUS


def parse_gpus(text: str) -> GpuTopology:
    """Reads CARD or CARD:COUNT, such as h100 or h100:8.

    Raises:
      InputError: the text has another form, or names no known card.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::([1-9]\d*))?", text)
    if match is None or match[1] not in GPUS:
        raise InputError(
            f"--topology is {text}; GPUs have the form CARD or CARD:COUNT, such as h100 or h100:8 "
            f"(cards: {', '.join(GPUS)})"
        )
    return GpuTopology(GPUS[match[1]], int(match[2] or 1))
