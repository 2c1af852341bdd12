"""The speed of ways to multiply a few rows by a weight, which is what a decode step mostly does.

python -m benchmarks.products

It times each way over so many weights that they are read from memory, not from a processor's cache.
`decoding/linear.py` takes the fastest on each backend. The rows that multiply weights in eight or
four bits are bfloat16. With the package qwix installed, its products are measured, too.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.benchmarks.machine import copy_bandwidth, machine
from plt_jax.benchmarks.rounds import interleave, positive_integers, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.decoding.linear import linear
from plt_jax.decoding.quantization import Quantized, quantize

Product = Callable[[jax.Array, Any], jax.Array]


def product(formula: str) -> Product:
    return lambda x, w: jnp.einsum(formula, x, w, preferred_element_type=jnp.float32)


def fused_sum(x_MD: jax.Array, weight_ND: jax.Array) -> jax.Array:
    x_MD = jax.lax.optimization_barrier(x_MD.astype(jnp.float32))
    return jnp.sum(weight_ND[None].astype(jnp.float32) * x_MD[:, None], axis=-1)


def converted(multiply: Product) -> Product:
    """A product with weights that are converted to the dtype of the rows, and scaled behind it."""
    return lambda x, w: multiply(x, w.values.astype(x.dtype)) * w.scales[:, 0]


def rows_in_eight_bits(x_MD: jax.Array, weight: Quantized) -> jax.Array:
    """A product of whole numbers, of rows that have eight bits, too."""
    rows = quantize(x_MD)
    values = jax.lax.optimization_barrier(rows.values)
    sums = jnp.einsum("MD,ND->MN", values, weight.values, preferred_element_type=jnp.int32)
    return sums * rows.scales * weight.scales[:, 0]


def in_four_bits(weight: jax.Array) -> Quantized:
    """Symmetric rounding to four bits, with one scale for each output."""
    scales = jnp.max(jnp.abs(weight), axis=1, keepdims=True) / 7
    return Quantized(jnp.round(weight / scales).astype(jnp.int4), scales)


class Form(NamedTuple):
    """A way to multiply."""

    name: str
    multiply: Product
    dtype: str
    """The dtype of the weights."""
    store: Callable[[jax.Array], Any] = lambda weight: weight
    """The weight [N, D] as the product takes it."""


def forms() -> list[Form]:
    """All ways that can be measured here."""
    outputs_first = product("MD,ND->MN")
    found = [
        form
        for dtype in ("float32", "bfloat16")
        for form in (
            Form("product, inputs first", product("MD,DN->MN"), dtype, jnp.transpose),
            Form("product, outputs first", outputs_first, dtype),
            Form("fused sum, outputs first", fused_sum, dtype),
            Form("decoding.linear.linear", linear, dtype),
        )
    ]
    found += [
        Form("converted, product", converted(outputs_first), "int8", quantize),
        Form("converted, fused sum", converted(fused_sum), "int8", quantize),
        Form("rows in eight bits", rows_in_eight_bits, "int8", quantize),
        Form("decoding.linear.linear", linear, "int8", quantize),
        Form("converted, product", converted(outputs_first), "int4", in_four_bits),
        Form("converted, fused sum", converted(fused_sum), "int4", in_four_bits),
    ]
    if importlib.util.find_spec("qwix") is not None:
        import qwix  # pyright: ignore[reportMissingImports]

        store = functools.partial(qwix.quantize, qtype=jnp.int8, channelwise_axes=[0])

        def both_in_eight_bits(x_MD: jax.Array, weight: Any) -> jax.Array:
            return qwix.dot_general(store(x_MD), weight, SUM_OF_LAST)

        found += [
            Form("qwix", lambda x, w: qwix.dot_general(x, w, SUM_OF_LAST), "int8", store),
            Form("qwix, rows in eight bits", both_in_eight_bits, "int8", store),
        ]
    return found


SUM_OF_LAST = (((1,), (1,)), ((), ()))


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
        "--megabytes", type=int, default=200, help="megabytes of all weights together, in bfloat16"
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
    print(f"{'billion weights/s':34}" + "".join(f"{f'M={M}':>9}" for M in arguments.rows))
    all_forms = forms()
    for dtype in dict.fromkeys(form.dtype for form in all_forms):
        alike = [form for form in all_forms if form.dtype == dtype]
        count = max(1, arguments.megabytes * 10**6 // (D * N * 2))
        found = {
            M: interleave(
                {form.name: timer(form, M, D, N, count) for form in alike}, arguments.rounds
            )
            for M in arguments.rows
        }
        for form in alike:
            speeds = {
                M: [count * D * N / one / 1e9 for one in found[M][form.name]]
                for M in arguments.rows
            }
            row = {M: spread("billion_weights_per_second", all) for M, all in speeds.items()}
            report["rows"].append({"form": form.name, "dtype": dtype, "by_rows": row})
            figures = "".join(
                f"{row[M]['billion_weights_per_second']:9.1f}" for M in arguments.rows
            )
            print(f"{dtype:9}{form.name:25}{figures}", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def timer(form: Form, M: int, D: int, N: int, count: int) -> Callable[[], float]:
    """A timer of products with `count` weights, each of which waits for the one before.

    Args:
      M: rows.
      D: inputs.
      N: outputs.
    """
    dtype = form.dtype if form.dtype in ("float32", "bfloat16") else "bfloat16"
    weights = [form.store(jnp.full((N, D), 0.01 * (1 + index), dtype)) for index in range(count)]
    x = jnp.ones((M, D), dtype)

    @jax.jit
    def run(x, weights):
        total = jnp.zeros((M, N), jnp.float32)
        for weight in weights:
            total += form.multiply(x + 1e-9 * total[:, :1].astype(x.dtype), weight)
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
