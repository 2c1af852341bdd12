"""Compares splash attention on four host devices with the reference; prints the largest differences
of the output and the gradients as JSON.

Runs in a process of its own, since the number of devices is fixed when JAX starts:
`python -m tests.model.kernels_worker`.
"""

import functools
import json

import jax
import numpy as np

from plt_jax.config import MeshConfig
from plt_jax.distributed.mesh import make_mesh, use_mesh
from plt_jax.model import kernels
from plt_jax.model.blockwise import windowed_attention

B, N, K, T, H, WINDOW = 4, 4, 2, 40, 8, 5


def main() -> None:
    rng = np.random.default_rng(0)
    q, k, v, weights = (rng.normal(size=(B, n, T, H)).astype(np.float32) for n in (N, K, K, N))
    documents = np.cumsum(rng.random((B, T)) < 0.1, axis=1).astype(np.int32)

    def out_and_gradients(attend):
        def run(*inputs):
            out, pullback = jax.vjp(lambda *x: attend(*x, documents, WINDOW), *inputs)
            return out, *pullback(weights)

        return jax.jit(run)(q, k, v)

    kernels.make_splash_mha = functools.partial(kernels.make_splash_mha, interpret=True)
    expected = out_and_gradients(windowed_attention)
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))):
        actual = out_and_gradients(kernels.splash_attention)
    differences = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), actual, expected)
    parts = {str(shard.data.shape) for shard in actual[0].addressable_shards}
    print(json.dumps({"differences": differences, "parts": sorted(parts)}))


if __name__ == "__main__":
    main()
