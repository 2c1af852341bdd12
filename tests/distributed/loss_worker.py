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


def main() -> None:
    module.BLOCK_LOGITS = {"cpu": 1}
    inputs = arrays(8, 8, 6, 12)
    expected = with_gradients(plain, *inputs, z_loss=0.3)
    found = {"meshes": {}, "specs": {}, "reduce_scatters": {}}
    for name, sizes in MESHES.items():
        found["meshes"][name] = []
        for positions in (100, 3):
            module.MIN_POSITIONS = positions
            with use_mesh(make_mesh(MeshConfig(**sizes))):
                step = jax.jit(lambda *x: with_gradients(module.head_loss, *x, z_loss=0.3))
                compiled = step.lower(*inputs).compile()
                actual = compiled(*inputs)
            differences = jax.tree.map(
                lambda x, y: float(np.abs(x - y).max() / np.abs(y).max()), actual, expected
            )
            case = {"positions": positions, "differences": jax.tree.leaves(differences)}
            found["meshes"][name].append(case)
        found["specs"][name] = list(actual[1][1].sharding.spec)
        found["reduce_scatters"][name] = "reduce-scatter" in compiled.as_text()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
