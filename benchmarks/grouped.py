"""The speed of grouped products, with every kernel that the devices run.

python -m benchmarks.grouped --tokens 1024,8192 --experts 8,64

It times an expert's up product, forward, and forward and backward. Groups differ in size, as those
of trained routers do. A dense product of as many rows with one weight is timed for comparison.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.rounds import interleave, positive_integers, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.errors import InputError
from plt_jax.model.grouped import KERNELS, available_kernels

GroupedProduct = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def dense(rows_MD: jax.Array, weight_XDN: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """Multiplies all rows by the first weight: an upper bound of a grouped product's speed."""
    return rows_MD @ weight_XDN[0]


def kernels_here() -> dict[str, GroupedProduct]:
    """The kernels that this machine's devices run, after the dense product."""
    return {"dense": dense} | {name: KERNELS[name] for name in available_kernels()}


def main() -> None:
    parser = CommandParser(
        prog="python -m benchmarks.grouped", description="Measure grouped products."
    )
    parser.add_argument("--tokens", type=positive_integers, default=[1024], help="tokens per batch")
    parser.add_argument(
        "--experts", type=positive_integers, default=[8, 64], help="numbers of experts"
    )
    parser.add_argument("--per_token", type=int, default=2, help="experts per token")
    parser.add_argument(
        "--widths", type=positive_integers, default=[192, 768], help="inputs of a weight"
    )
    parser.add_argument("--outputs", type=int, default=512, help="outputs of a weight")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    if min(arguments.per_token, arguments.outputs, arguments.rounds) < 1:
        raise InputError("--per_token, --outputs and --rounds must be at least 1")
    if arguments.per_token > min(arguments.experts):
        raise InputError(
            f"--per_token {arguments.per_token} is above --experts {min(arguments.experts)}"
        )
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.grouped", *sys.argv[1:]]),
        "machine": machine(),
        "dtype": arguments.dtype,
        "cells": [],
    }
    kernels = kernels_here()
    print(f"GFLOP/s, {arguments.dtype}, {arguments.outputs} outputs, {arguments.per_token} experts")
    names = "".join(f"{name:>12}" for name in kernels)
    print(f"{'tokens':>8}{'experts':>9}{'inputs':>8}  {'pass':12}{names}")
    for tokens in arguments.tokens:
        for experts in arguments.experts:
            for width in arguments.widths:
                for backward in (False, True):
                    shape = (tokens * arguments.per_token, experts, width, arguments.outputs)
                    cell = measure(kernels, shape, arguments.dtype, backward, arguments.rounds)
                    report["cells"].append({"tokens": tokens, **cell})
                    label = "and backward" if backward else "forward"
                    print(f"{tokens:>8}{experts:>9}{width:>8}  {label:12}", end="")
                    print("".join(f"{cell[name]['gflops']:12.1f}" for name in kernels), flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(
    kernels: dict[str, GroupedProduct],
    shape: tuple[int, int, int, int],
    dtype: str,
    backward: bool,
    rounds: int,
) -> dict[str, Any]:
    """GFLOP/s of every kernel, for M rows, X experts, D inputs and N outputs."""
    M, X, D, N = shape
    random = np.random.default_rng(0)
    sizes_X = jnp.asarray(random.multinomial(M, random.dirichlet(np.full(X, 5.0))), jnp.int32)
    rows_MD, weight_XDN, grad_MN = (
        jnp.asarray(random.normal(size=size), dtype) for size in ((M, D), (X, D, N), (M, N))
    )

    def timer(kernel: GroupedProduct) -> Callable[[], float]:
        @jax.jit
        def run(rows_MD, weight_XDN, sizes_X, grad_MN):
            if not backward:
                return kernel(rows_MD, weight_XDN, sizes_X)
            out_MN, pull = jax.vjp(lambda x, w: kernel(x, w, sizes_X), rows_MD, weight_XDN)
            return out_MN, pull(grad_MN)

        inputs = (rows_MD, weight_XDN, sizes_X, grad_MN)
        jax.block_until_ready(run(*inputs))

        def seconds() -> float:
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            return time.perf_counter() - start

        return seconds

    timers = {name: timer(kernel) for name, kernel in kernels.items()}
    flops = 2 * M * D * N * (3 if backward else 1)
    found = interleave(timers, rounds)
    return {
        "rows": M,
        "experts": X,
        "inputs": D,
        "outputs": N,
        "backward": backward,
        "largest_group": int(sizes_X.max()),
        **{
            name: spread("gflops", [flops / one / 1e9 for one in seconds])
            for name, seconds in found.items()
        },
    }


if __name__ == "__main__":
    run_command(main)
