"""Speed and memory of reading and writing Hugging Face checkpoints.

python -m benchmarks.interop

It makes a checkpoint of random bfloat16 weights in several files. In every round it measures, each
in a process of its own: the disk (reading the files' bytes after they left the page cache, and
writing as many), `load_huggingface` from the disk and from the page cache, `save_huggingface`, and
the commands `plt_jax.convert import` and `export`, which also read and write orbax checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from plt_jax.benchmarks.machine import machine
from plt_jax.commands.parser import CommandParser, run_command

SHARD_BYTES = 500 * 10**6
READ_BYTES = 16 * 2**20


def main() -> None:
    parser = CommandParser(
        prog="python -m benchmarks.interop",
        description="Measure reading and writing of Hugging Face checkpoints.",
    )
    parser.add_argument("--layers", type=int, default=16, help="layers of 61 million parameters")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each is measured")
    parser.add_argument(
        "--folder", help="folder on the disk to measure; default a temporary folder"
    )
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_here(arguments.measure, Path(arguments.folder))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as home:
        make_checkpoint(Path(home), arguments.layers)
        rounds = [
            {name: measure(name, Path(home)) for name in MEASUREMENTS}
            for _ in range(arguments.rounds)
        ]
        size = checkpoint_bytes(Path(home))
    report = {"checkpoint_bytes": size, "machine": machine(), "rounds": rounds}
    print(table(size, rounds))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def make_checkpoint(home: Path, layers: int) -> None:
    """Saves a PLT of random bfloat16 weights; 16 layers have 1.1 billion parameters."""
    import jax
    import ml_dtypes
    import numpy as np

    from plt_jax import ModelConfig, save_huggingface
    from plt_jax.model.transformer import abstract_params

    config = ModelConfig(
        vocab_size=32768, width=2048, layers=layers, heads=32, kv_heads=8, ffn_width=8192
    )
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = random.standard_normal(leaf.shape, np.float32).astype(ml_dtypes.bfloat16)
        return jax.device_put(x)

    import flax.linen as nn

    params = jax.tree.map(draw, nn.unbox(abstract_params(config)))
    save_huggingface(home / "source", config, params, shard_bytes=SHARD_BYTES)


def checkpoint_bytes(home: Path) -> int:
    """Bytes of the checkpoint's safetensors files."""
    return sum(file.stat().st_size for file in (home / "source").glob("*.safetensors"))


def drop_from_page_cache(folder: Path) -> None:
    """Writes a folder's files to the disk, and removes them from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(home: Path) -> None:
    """Reads the bytes of the checkpoint's files, and discards them."""
    buffer = bytearray(READ_BYTES)
    for file in sorted((home / "source").glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def write_bytes(home: Path) -> None:
    """Writes as many bytes as the checkpoint has."""
    left, buffer = checkpoint_bytes(home), os.urandom(READ_BYTES)
    with open(home / "written", "wb", buffering=0) as opened:
        while left > 0:
            left -= opened.write(buffer[:left])


def load(home: Path) -> None:
    from plt_jax import load_huggingface

    load_huggingface(home / "source")


def loaded_saver(home: Path) -> Callable[[], None]:
    from plt_jax import load_huggingface, save_huggingface

    config, params = load_huggingface(home / "source")
    return lambda: save_huggingface(home / "saved", config, params, shard_bytes=SHARD_BYTES)


def convert(home: Path, *words: str) -> None:
    from plt_jax.commands.convert import main

    sys.argv = ["plt_jax.convert", *words]
    with contextlib.redirect_stdout(io.StringIO()):
        main()


def import_run(home: Path) -> None:
    convert(home, "import", str(home / "source"), str(home / "run"))


def export_run(home: Path) -> None:
    convert(home, "export", str(home / "run"), str(home / "exported"), "--shard_gb", "0.5")


MEASUREMENTS = ("read", "write", "load", "load_cached", "save", "import", "export")
LABELS = {
    "read": "the files' bytes, from the disk",
    "write": "as many bytes, to the disk",
    "load": "load_huggingface, from the disk",
    "load_cached": "load_huggingface, from the page cache",
    "save": "save_huggingface",
    "import": "convert import, from the disk",
    "export": "convert export, from the disk",
}


def measure(name: str, home: Path) -> dict[str, float]:
    """Measures one action in a fresh process, so that the peak of memory is the action's."""
    for left in {"save": ["saved"], "import": ["run"], "export": ["exported"]}.get(name, []):
        shutil.rmtree(home / left, ignore_errors=True)
    words = [sys.executable, "-m", "benchmarks.interop", "--measure", name]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*words, "--folder", str(home)], env=environment, capture_output=True, check=True
    )
    return json.loads(done.stdout)


def measure_here(name: str, home: Path) -> dict[str, float]:
    """Seconds of an action, and bytes of memory that it adds to those of the imports."""
    import jax

    jax.devices()
    action: Callable[[], None]
    if name == "save":
        action = loaded_saver(home)
    else:
        action = {
            "read": lambda: read_bytes(home),
            "write": lambda: write_bytes(home),
            "load": lambda: load(home),
            "load_cached": lambda: load(home),
            "import": lambda: import_run(home),
            "export": lambda: export_run(home),
        }[name]
    if name == "load_cached":
        read_bytes(home)
    elif name != "save":
        drop_from_page_cache(home)
    before = peak_memory()
    start = time.perf_counter()
    action()
    if name in ("write", "save", "import", "export"):
        os.sync()  # the time includes writing to the disk
    return {"seconds": time.perf_counter() - start, "memory_bytes": peak_memory() - before}


def peak_memory() -> int:
    """Peak of this process's resident memory in bytes, with files mapped into memory."""
    # getrusage would not do: a process inherits its peak from the one that started it.
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024


def table(size: int, rounds: list[dict[str, dict[str, float]]]) -> str:
    """The figures as text: medians over the rounds, and the range of the seconds."""
    lines = [f"checkpoint of {size / 1e9:.2f} GB, {len(rounds)} rounds"]
    lines.append(f"{'':38} {'seconds':>8} {'(range)':>14} {'GB/s':>6} {'memory GB':>10}")
    for name in MEASUREMENTS:
        seconds = [one[name]["seconds"] for one in rounds]
        memory = statistics.median(one[name]["memory_bytes"] for one in rounds)
        median = statistics.median(seconds)
        spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
        lines.append(
            f"{LABELS[name]:38} {median:8.2f} {spread:>14} {size / 1e9 / median:6.2f} "
            f"{memory / 1e9:10.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
