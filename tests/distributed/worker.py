"""Trains small models on eight host devices, in several meshes; prints what it found as JSON.

Runs in a process of its own, since the number of devices is fixed when JAX starts:
`python -m tests.distributed.worker FOLDER`. The folder gets runs trained on a
2 x 2 x 2 mesh.
"""

import contextlib
import filecmp
import functools
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from plt_jax import load_huggingface, save_huggingface
from plt_jax.config import RunConfig
from plt_jax.distributed.mesh import batch_layout, make_mesh, shardings_of
from plt_jax.errors import InputError
from plt_jax.evaluation.scores import evaluate_trained
from plt_jax.model.transformer import abstract_params
from plt_jax.training.program import TrainProgram
from plt_jax.training.step import TrainState
from plt_jax.training.trainer import train
from tests.models import random_params, small_config
from tests.training.runs import call_at, make_home, tiny_config

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "data and tensor": {"data": 4, "fsdp": 1, "tensor": 2},
    "tensor": {"data": 1, "tensor": 2},
    "context": {"data": 1, "context": 8},
    "context and all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}
SHAPE = {
    "vocab_size": 64,
    "max_length": 16,
    "width": 16,
    "layers": 1,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 32,
    "qk_norm": True,
    "loop": {"scheme": "plt", "count": 2, "window": 3},
}


MIDDLE = {"layers": 3, "loop": SHAPE["loop"] | {"first_layer": 1, "last_layer": 1}}
"""The middle of three layers loops, and every loop has a loss."""


def make_config(mesh, accumulate=1, optimizer="adamw", middle=False, **sizes) -> RunConfig:
    # An epsilon well above rounding, since Adam divides tiny gradients by themselves.
    steady = {"learning_rate": 1e-2, "warmup_fraction": 0.0, "epsilon": 1e-3}
    return RunConfig(
        model=SHAPE | (MIDDLE if middle else {}) | sizes,
        data={"sequence_length": 16},
        mesh=mesh,
        optimizer=steady | {"name": optimizer},
        training={
            "steps": 10,
            "batch_size": 16,
            "accumulate": accumulate,
            "z_loss": 1e-2,
            "loop_losses": [0.3] if middle else [],
        },
    )


def make_batches():
    random = np.random.default_rng(0)
    for _ in range(2):
        tokens = random.integers(0, 64, (16, 17), np.int32)
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.cumsum(random.random((16, 16)) < 0.2, axis=1, dtype=np.int32),
            "weights": (random.random((16, 16)) < 0.8).astype(np.float32),
        }


def mesh_of(config):
    return make_mesh(config.mesh, jax.devices()[: abs(math.prod(config.mesh.sizes().values()))])


def take_steps(config: RunConfig) -> tuple[TrainState, list[dict[str, float | list]]]:
    """Two steps from the start."""
    mesh = mesh_of(config)
    program = TrainProgram.build(config, mesh)
    state = program.init_state()
    metrics = []
    for batch in make_batches():
        state, values = program.step(state, program.batch_layout.place(batch))
        metrics.append({name: value.tolist() for name, value in jax.device_get(values).items()})
    return state, metrics


@functools.cache
def on_one_device(optimizer, middle):
    """Parameters at the start and after the steps, by name, and the metrics."""
    config = make_config(MESHES["one"], optimizer=optimizer, middle=middle)
    start = named(jax.device_get(TrainProgram.build(config, mesh_of(config)).init_state().params))
    state, metrics = take_steps(config)
    return start, named(jax.device_get(state.params)), metrics


def named(tree) -> dict[str, jax.Array]:
    """Leaves by their path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def compare(mesh: str, accumulate: int, optimizer: str = "adamw", middle: bool = False) -> dict:
    """What a mesh gives against one device: metrics, largest differences, shards."""
    start, expected, against = on_one_device(optimizer, middle)
    got, metrics = take_steps(make_config(MESHES[mesh], accumulate, optimizer, middle))
    params = named(jax.device_get(got.params))
    return {
        "metrics": metrics,
        "expected": against,
        "differences": largest_differences(expected, params),
        "moved": largest_differences(expected, start),
        "shards": {
            name: [leaf.addressable_shards[0].data.shape, len(leaf.sharding.device_set)]
            for name, leaf in named(got).items()
        },
    }


def largest_differences(one, other) -> dict[str, float]:
    return {name: float(np.abs(one[name] - other[name]).max()) for name in one}


def refusal(make) -> str:
    try:
        make()
    except InputError as error:
        return str(error)
    return "not refused"


def refusals() -> dict[str, str]:
    def state(mesh, **sizes):
        config = make_config(mesh, **sizes)
        return lambda: TrainProgram.build(config, make_mesh(config.mesh))

    def step(mesh, accumulate):
        config = make_config(mesh, accumulate)
        return lambda: TrainProgram.build(config, make_mesh(config.mesh))

    tensor_4 = {"data": 2, "tensor": 4}
    return {
        "more devices": refusal(state({"data": 16})),
        "fewer devices": refusal(state({"data": 4})),
        "no size": refusal(state({"tensor": 3})),
        "kv_heads": refusal(state(tensor_4)),
        "heads": refusal(state(tensor_4, heads=2, kv_heads=2, head_width=4)),
        "width": refusal(state({"data": 1, "fsdp": 8}, width=20, head_width=4)),
        "vocabulary": refusal(state({"data": 4, "tensor": 2}, vocab_size=63)),
        "micro-batch": refusal(step({"data": 8}, 4)),
        "batch": refusal(
            lambda: batch_layout(
                make_mesh(RunConfig().mesh), ("training.batch_size", 12), ("length", 4)
            )
        ),
    }


def train_and_evaluate(folder: Path) -> dict:
    """A run on all eight devices, stopped in the middle, gone on with, and evaluated on them too.

    Leaves it as it was when stopped in FOLDER/stopped.
    """
    config = tiny_config(make_home(folder / "home"), folder / "run", mesh=MESHES["all"])
    with call_at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train(config).stopped
    shutil.copytree(folder / "run", folder / "stopped")
    evaluation = evaluate_trained(str(folder / "stopped"), batch_size=3).numbers
    return {"step": train(config).step, "evaluation": evaluation}


def import_and_export(folder: Path) -> dict:
    """A mixture-of-experts PLT written from one device, read onto all, and written from there."""
    config = small_config(
        qk_norm=True, vocab_size=32, gate_input="hidden", moe={"experts": 4, "shared_width": 8}
    )
    params = random_params(config)
    save_huggingface(folder / "one", config, params, shard_bytes=3000)
    mesh = make_mesh(RunConfig(mesh=MESHES["all"]).mesh)
    _, sharded = load_huggingface(folder / "one", mesh=mesh)
    save_huggingface(folder / "all", config, sharded, shard_bytes=3000)
    names = sorted(file.name for file in (folder / "one").iterdir())
    boxed = abstract_params(config)
    _, differing, missing = filecmp.cmpfiles(folder / "one", folder / "all", names, shallow=False)
    return {
        "files": len(names),
        "different_files": differing + missing,
        "differences": largest_differences(named(params), named(jax.device_get(sharded))),
        "misplaced": [
            name
            for name, wanted in named(shardings_of(boxed, mesh)).items()
            if named(sharded)[name].sharding != wanted
        ],
    }


def main(folder: Path) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        found = {
            "devices": jax.device_count(),
            "meshes": {
                mesh: compare(mesh, accumulate=2 if mesh == "data" else 1)
                for mesh in MESHES
                if mesh != "one"
            },
            "middle": compare("context and all", accumulate=1, middle=True),
            "muon": compare("all", accumulate=1, optimizer="muon"),
            "refusals": refusals(),
            "trained": train_and_evaluate(folder),
            "imported": import_and_export(folder),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
