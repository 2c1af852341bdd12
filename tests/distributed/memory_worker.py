"""Initialises the 1.2B dense model, with half of its layers, over eight host devices; prints bytes
as JSON.

Runs in a process of its own, whose memory nothing else has used:
`python -m tests.distributed.memory_worker`.
"""

import json
import resource

import jax

from plt_jax.distributed.mesh import make_mesh
from plt_jax.runs.configuration import load_config
from plt_jax.training.program import TrainProgram
from tests.training.runs import REPOSITORY

LAYERS = 8


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    mesh = {"data": 1, "fsdp": 8}
    changes = {"mesh": mesh, "model": {"layers": LAYERS}}
    config = load_config(REPOSITORY / "configs" / "plt_dense_1b.yaml", changes)
    before = peak()
    params = jax.block_until_ready(TrainProgram.build(config, make_mesh(config.mesh)).init_params())
    leaves = jax.tree.leaves(params)
    found = {"before": before, "peak": peak(), "parameters": sum(leaf.nbytes for leaf in leaves)}
    found["devices"] = len(leaves[0].sharding.device_set)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
