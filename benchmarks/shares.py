"""How much memory the hosts of a model need that processes share, beside their share of it.

python -m benchmarks.shares --gigabytes 1

It makes a run with random float32 parameters. For each use of it, two processes of four simulated
devices start, under fsdp 4 x tensor 2, which hold half of the parameters each. The memory of a use
is the largest anonymous memory (RssAnon of /proc) of a process, less what it had before. Devices
are simulated in the hosts' memory, so that this holds the shards themselves, too. Compiling takes
memory of its own; a second call with JAX_COMPILATION_CACHE_DIR shows the figures without.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import MeshConfig, ModelConfig, ProcessesConfig, RunConfig
from plt_jax.errors import FailedError, InputError
from plt_jax.files.writing import write_text
from plt_jax.reports.tables import table_of

USES = ("read", "evaluate", "lay_out", "generate", "export")
PROCESSES, DEVICES = 2, 4
MESH = MeshConfig(data=1, fsdp=4, tensor=2)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Variables with which the C library (glibc) gives large blocks back as they are freed. Without
them it keeps up to a third of the share for later blocks."""
MEBIBYTE = 2**20
COLUMNS = (
    ("share", "share, MB", "{:,.0f}"),
    ("peak", "memory, MB", "{:,.0f}"),
    ("of_share", "of the share", "{:.2f}"),
)


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.shares", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the parameters")
    parser.add_argument("--width", type=int, default=1024, help="width of the model")
    parser.add_argument("--uses", default=",".join(USES), help="what is measured")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--child", help="of this command: what a process measures")
    arguments = parser.parse_args()
    if arguments.child is not None:
        measure(json.loads(arguments.child))
        return
    uses = arguments.uses.split(",")
    if unknown := set(uses) - set(USES):
        raise InputError(f"--uses {unknown.pop()} is unknown; there are {', '.join(USES)}")
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments.gigabytes, arguments.width, Path(folder) / "run")
        make_run(config, Path(folder) / "text.txt")
        rows = [
            {"label": f"{use}, process {index}", **row}
            for use in uses
            for index, row in enumerate(start(use, folder))
        ]
    print(table_of(COLUMNS, rows))
    if arguments.out:
        write_text(Path(arguments.out), json.dumps(rows, indent=2) + "\n")


def config_of(gigabytes: float, width: int, run_dir: Path) -> RunConfig:
    """A run whose parameters have about so many bytes in float32."""
    heads, vocab_size, ffn_width = width // 64, 8192, 4 * width
    of_layer = 4 * (4 * width * width + 3 * width * ffn_width)
    layers = max(round((gigabytes * 1e9 - 8 * vocab_size * width) / of_layer), 1)
    model = ModelConfig(
        vocab_size=vocab_size,
        max_length=128,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        ffn_width=ffn_width,
        qk_norm=False,
    )
    return RunConfig(run_dir=str(run_dir), model=model)


def make_run(config: RunConfig, text: Path) -> None:
    """Makes the run, whose checkpoint has the shards of the mesh, and a text."""
    os.environ |= simulated(PROCESSES * DEVICES)
    import jax

    from plt_jax.data.synthetic_examples import byte_tokenizer
    from plt_jax.distributed.axes import unboxed
    from plt_jax.distributed.mesh import make_mesh, shardings_of
    from plt_jax.model.transformer import Transformer, abstract_params
    from plt_jax.runs.directory import create_run

    tokens = jax.numpy.zeros((1, 8), jax.numpy.int32)
    shardings = shardings_of(abstract_params(config.model), make_mesh(MESH))

    def init() -> Any:
        return unboxed(Transformer(config.model).init(jax.random.key(0), tokens)["params"])

    params = jax.jit(init, out_shardings=shardings)()
    create_run(config, params, byte_tokenizer(config), {})
    text.write_text("the state of our union is strong " * 60, encoding="utf-8")


def simulated(devices: int) -> dict[str, str]:
    """Variables of a process that sees so many CPU devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{count} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def start(use: str, folder: str) -> list[dict[str, float]]:
    """What each process has measured of a use."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | simulated(DEVICES) | GIVE_BACK
    started = []
    for index in range(PROCESSES):
        processes = {"coordinator": f"localhost:{port}", "count": PROCESSES, "index": index}
        child = json.dumps({"use": use, "folder": folder, "processes": processes})
        words = [sys.executable, "-m", "benchmarks.shares", "--child", child]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(words, env=environment, text=True, **pipes))
    rows = []
    for process in started:
        _, err = process.communicate()
        found = [line for line in err.splitlines() if line.startswith('{"share"')]
        if not found:
            raise FailedError(f"a process failed: {err[-500:]}")
        rows.append(json.loads(found[0]))
    return rows


def measure(child: dict[str, Any]) -> None:
    """Measures one use in one of the processes, and prints it to stderr as JSON."""
    import jax

    from plt_jax.decoding.generation import generate as generate_tokens
    from plt_jax.decoding.weights import DecodeWeights, prepare_for_decode
    from plt_jax.distributed import processes, rendezvous
    from plt_jax.distributed.mesh import abstract_arrays, make_mesh, use_mesh
    from plt_jax.evaluation.scores import evaluate_trained
    from plt_jax.model.transformer import abstract_params
    from plt_jax.runs.conversion import export_run
    from plt_jax.runs.directory import find_checkpoint, open_for_decoding, open_trained

    rendezvous.initialize(ProcessesConfig(**child["processes"]))
    mesh = make_mesh(MESH)
    run, text = (str(Path(child["folder"]) / name) for name in ("run", "text.txt"))

    def read() -> None:
        jax.block_until_ready(open_trained(run, mesh).params)

    def evaluate() -> None:
        evaluate_trained(run, text, 4, mesh=mesh)

    def lay_out() -> tuple[ModelConfig, DecodeWeights]:
        trained = open_for_decoding(run, mesh)
        config = trained.config.model
        with use_mesh(mesh):
            return config, jax.block_until_ready(prepare_for_decode(config, trained.params))

    def generate() -> None:
        with use_mesh(mesh):
            generate_tokens(*lay_out(), [[1, 2, 3]], 8)

    def export() -> None:
        target = f"{run}/exported"
        export_run(run, target, None, 16 * MEBIBYTE, mesh=mesh, report=lambda line: None)

    uses: dict[str, Callable[[], Any]] = {
        "read": read,
        "evaluate": evaluate,
        "lay_out": lay_out,
        "generate": generate,
        "export": export,
    }
    config = find_checkpoint(run).config.model
    leaves = jax.tree.leaves(abstract_arrays(abstract_params(config), mesh))
    share = sum(
        DEVICES * leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in leaves
    )
    with contextlib.redirect_stdout(io.StringIO()):
        peak = peak_of(uses[child["use"]])
    found = {"share": share / 1e6, "peak": peak / 1e6, "of_share": peak / share}
    print(json.dumps(found), file=sys.stderr, flush=True)
    processes.barrier("both are measured", 300)


def peak_of(use: Callable[[], Any]) -> int:
    """The most memory while a function runs, over that before it, in bytes."""
    before, done, most = resident(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        use()
    finally:
        done.set()
        watcher.join()
    return most[0] - before


def resident() -> int:
    """Bytes of this process's memory, without those of files that it has mapped."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_command(main)
