"""The machine that a measurement ran on, and the speed of its memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "safetensors")


def machine() -> dict[str, str | int | None]:
    """Processor, cores, device, platform, and the versions of Python and packages."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def processor() -> str:
    """The processor's model name; on systems without /proc/cpuinfo what Python knows."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def copy_bandwidth(rounds: int = 9) -> float:
    """Bytes per second that a copy of a large array reads and writes, on the first device."""
    size = 2**29 if jax.default_backend() == "cpu" else 2**31
    # The target is donated: allocating new memory is slow on some systems.
    copy = jax.jit(lambda source, target: source + 1, donate_argnums=1, keep_unused=True)
    source, target = jnp.zeros(size // 4, jnp.float32), jnp.ones(size // 4, jnp.float32)
    target = copy(source, target).block_until_ready()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        target = copy(source, target).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds)
