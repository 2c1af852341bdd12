"""Reads the parameters `x` [L, D, F] of a folder's checkpoint 0 onto all processes' devices, D over
mesh.fsdp and F over mesh.tensor; prints as JSON how many bytes this process has read from files.

As a command for `run_together`: `tests.distributed.reading FOLDER`.
"""

import json
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from plt_jax.checkpoint.params import load_params, stored_params
from plt_jax.config import MeshConfig
from plt_jax.distributed.mesh import make_mesh


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def main() -> None:
    (stored,) = jax.tree.leaves(stored_params(sys.argv[1], 0))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    abstract = {"x": jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)}
    before = bytes_read()
    jax.block_until_ready(load_params(sys.argv[1], 0, abstract))
    print(json.dumps(bytes_read() - before))


if __name__ == "__main__":
    main()
