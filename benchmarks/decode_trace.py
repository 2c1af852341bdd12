"""Records what a device runs while it decodes, with JAX's profiler.

python -m benchmarks.decode_trace CONFIG --out FOLDER [--schemes no_loop,plt] [--batch 1]

For each scheme FOLDER/LABEL-bBATCH.json gets the device's events (on a GPU its kernels) with their
number and microseconds per token; a table goes to the standard output. Compilation is not recorded.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from plt_jax.benchmarks.decode import DecodeSettings, Workload
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.prepared import prepare, random_weights
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import ModelConfig
from plt_jax.config.variants import NO_LOOP, variants_of
from plt_jax.errors import FailedError
from plt_jax.files.writing import write_text
from plt_jax.runs.configuration import load_config

MOST_SHOWN = 40
"""Rows of a table."""


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.decode_trace", description=__doc__)
    parser.add_argument("config", help="YAML file, whose model is decoded with every scheme")
    parser.add_argument("--schemes", default="no_loop,plt", help="looping schemes")
    parser.add_argument("--loops", type=int, default=2, help="number of loops")
    parser.add_argument("--batch", type=int, default=1, help="batch size")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache before")
    parser.add_argument("--tokens", type=int, default=4, help="tokens that are recorded")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype")
    parser.add_argument("--out", required=True, help="folder for the figures")
    arguments = parser.parse_args()
    model = load_config(arguments.config).model.model_dump()
    longest = max(model["max_length"], 2 * arguments.context)
    base = ModelConfig(**model | {"dtype": arguments.dtype, "max_length": longest})
    weights = random_weights(NO_LOOP.apply(base))
    settings = DecodeSettings(tokens=arguments.tokens)
    workload = Workload(base, arguments.batch, arguments.context, settings)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for variant in variants_of(arguments.schemes.split(","), [arguments.loops]):
        row = prepare(variant, base, weights)
        workload.decode_seconds(row)  # compiles
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                workload.decode_seconds(row)
            events = device_events(Path(folder), arguments.tokens + 1)  # one is not timed
        print(table(variant.label, events), flush=True)
        found = {"label": variant.label, "machine": machine(), "events": events}
        name = f"{variant.label}-b{arguments.batch}.json"
        write_text(out / name, json.dumps(found, indent=1) + "\n")


def device_events(folder: Path, tokens: int) -> list[dict[str, Any]]:
    """The device's events per token, the longest first.

    Raises:
      FailedError: the profiler recorded nothing.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for file in folder.rglob("*.xplane.pb"):
        data = jax.profiler.ProfileData.from_file(str(file))
        for plane in data.planes:
            on_device = plane.name.startswith("/device:")
            for line in plane.lines:
                # A GPU's kernels are in its streams; a CPU has its thunks in threads of the host.
                if on_device and not line.name.startswith("Stream"):
                    continue
                if not on_device and not line.name.startswith("tf_XLA"):
                    continue
                for event in line.events:
                    totals[event.name][0] += 1
                    totals[event.name][1] += event.duration_ns / 1e3
    if not totals:
        raise FailedError("the profiler recorded no event of the device")
    rows = [
        {"name": name, "per_token": count / tokens, "us_per_token": us / tokens}
        for name, (count, us) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["us_per_token"])


def table(label: str, events: list[dict[str, Any]]) -> str:
    """The longest events as text."""
    count = sum(row["per_token"] for row in events)
    total = sum(row["us_per_token"] for row in events)
    lines = [f"{label}: {count:.0f} events and {total:.0f} us a token"]
    lines += [
        f"{row['us_per_token']:>10.1f} us {row['per_token']:>8.1f} x  {row['name'][:80]}"
        for row in events[:MOST_SHOWN]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
