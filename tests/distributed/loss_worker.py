"""Compares the head's loss on meshes of eight host devices with that of all logits, in one block
and in several; prints JSON.

Runs in a process of its own, since the number of devices is fixed when JAX starts:
`python -m tests.distributed.loss_worker`.
"""

import json

import jax
import numpy as np

from plt_jax.config import MeshConfig
from plt_jax.distributed.mesh import make_mesh, use_mesh
from plt_jax.model import loss as module
from tests.model.losses import MESHES, arrays, plain, with_gradients

CASES = (
    # positions of a block; B, T, D, V; dtype
    (100, (8, 8, 6, 12), "bfloat16"),
    (3, (8, 8, 6, 12), "float32"),
    (2, (3, 5, 7, 11), "float32"),  # divides by no mesh axis
    (100, (8, 8, 6, 12), "float32"),
)


def main() -> None:
    module.BLOCK_LOGITS = {"cpu": 1}
    found = {"meshes": {}, "specs": {}, "reduce_scatters": {}}
    for name, sizes in MESHES.items():
        found["meshes"][name] = []
        for positions, shape, dtype in CASES:
            module.MIN_POSITIONS = positions
            inputs = arrays(*shape, dtype)
            expected = with_gradients(plain, *inputs, z_loss=0.3)
            with use_mesh(make_mesh(MeshConfig(**sizes))):
                step = jax.jit(lambda *x: with_gradients(module.head_loss, *x, z_loss=0.3))
                compiled = step.lower(*inputs).compile()
                actual = compiled(*inputs)
            differences = jax.tree.map(
                lambda x, y: float(np.abs(x - y).max() / np.abs(y).max()), actual, expected
            )
            case = {"shape": shape, "dtype": dtype, "differences": jax.tree.leaves(differences)}
            found["meshes"][name].append(case)
        found["specs"][name] = list(actual[1][1].sharding.spec)
        found["reduce_scatters"][name] = "reduce-scatter" in compiled.as_text()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
