"""The speed of ways to multiply a few rows by a weight, which is what a decode step mostly does.

python -m benchmarks.products

It times each way over so many weights that they are read from memory, not from a processor's cache.
`decoding/linear.py` takes the fastest on each backend.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from plt_jax.benchmarks.machine import copy_bandwidth, machine
from plt_jax.benchmarks.rounds import interleave, positive_integers, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.decoding.linear import linear

Product = Callable[[jax.Array, jax.Array], jax.Array]


def product(formula: str) -> Product:
    return lambda x, w: jnp.einsum(formula, x, w, preferred_element_type=jnp.float32)


def fused_sum(x_MD: jax.Array, weight_ND: jax.Array) -> jax.Array:
    x_MD = jax.lax.optimization_barrier(x_MD.astype(jnp.float32))
    return jnp.sum(weight_ND[None].astype(jnp.float32) * x_MD[:, None], axis=-1)


PRODUCTS: dict[str, tuple[str, Product]] = {
    "product, inputs first": ("DN", product("MD,DN->MN")),
    "product, outputs first": ("ND", product("MD,ND->MN")),
    "fused sum, outputs first": ("ND", fused_sum),
    "decoding.linear.linear": ("ND", linear),
}


def main() -> None:
    parser = CommandParser(
        prog="python -m benchmarks.products",
        description="Measure ways to multiply a few rows by a weight.",
    )
    parser.add_argument(
        "--rows", type=positive_integers, default=[1, 2, 3, 8, 64, 256], help="rows of x"
    )
    parser.add_argument("--inputs", type=int, default=768, help="inputs D of a weight")
    parser.add_argument("--outputs", type=int, default=6144, help="outputs N of a weight")
    parser.add_argument(
        "--megabytes", type=int, default=200, help="megabytes of all weights together"
    )
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    report = {
        "command": " ".join(["python -m benchmarks.products", *sys.argv[1:]]),
        "machine": machine(),
        "copy_gb_per_second": copy_bandwidth() / 1e9,
        "rows": [],
    }
    D, N = arguments.inputs, arguments.outputs
    print(f"{'GB/s of weights read':34}" + "".join(f"{f'M={M}':>9}" for M in arguments.rows))
    for dtype in ("float32", "bfloat16"):
        count = max(1, arguments.megabytes * 10**6 // (D * N * jnp.dtype(dtype).itemsize))
        found = {
            M: interleave(
                {name: timer(name, M, D, N, count, dtype) for name in PRODUCTS}, arguments.rounds
            )
            for M in arguments.rows
        }
        size = count * D * N * jnp.dtype(dtype).itemsize
        for name in PRODUCTS:
            speeds = {M: [size / one / 1e9 for one in found[M][name]] for M in arguments.rows}
            row = {M: spread("gb_per_second", values) for M, values in speeds.items()}
            report["rows"].append({"form": name, "dtype": dtype, "by_rows": row})
            figures = "".join(f"{row[M]['gb_per_second']:9.1f}" for M in arguments.rows)
            print(f"{dtype:9}{name:25}{figures}", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def timer(name: str, M: int, D: int, N: int, count: int, dtype: str) -> Callable[[], float]:
    """A timer of products with `count` weights, each of which waits for the one before.

    Args:
      name: the product's key in PRODUCTS.
      M: rows.
      D: inputs.
      N: outputs.
    """
    layout, multiply = PRODUCTS[name]
    shape = (D, N) if layout == "DN" else (N, D)
    weights = [jnp.full(shape, 0.01 * index, dtype) for index in range(count)]
    x = jnp.ones((M, D), dtype)

    @jax.jit
    def run(x, weights):
        total = jnp.zeros((M, N), jnp.float32)
        for weight in weights:
            total += multiply(x + 1e-9 * total[:, :1].astype(x.dtype), weight)
        return total

    def measure() -> float:
        # The first call frees memory that the product measured before this one has left.
        run(x, weights).block_until_ready()
        start = time.perf_counter()
        run(x, weights).block_until_ready()
        return time.perf_counter() - start

    return measure


if __name__ == "__main__":
    run_command(main)
