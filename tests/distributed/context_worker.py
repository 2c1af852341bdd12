"""Sequences spread over eight host devices against one device; prints what it found as JSON.

Runs in a process of its own: `python -m tests.distributed.context_worker`.
"""

import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.config import RunConfig
from plt_jax.distributed.mesh import make_mesh, use_mesh
from plt_jax.model import attention, blockwise, context_parallel, kernels
from plt_jax.model.looping import shift_states
from tests.models import small_config

B, N, K, H = 4, 4, 2, 4
MESHES = {
    "context 8": {"data": 1, "context": 8},
    "context 3": {"data": 1, "context": 3},
    "data 2 x context 2 x tensor 2": {"data": 2, "context": 2, "tensor": 2},
}
CASES = [
    # length, window, backend, blocks: windows within a device, over several, over all
    (48, None, "xla", 5),
    (24, None, "xla", 512),
    (48, 1, "xla", 512),
    (48, 5, "xla", 512),
    (48, 14, "xla", 512),
    (24, 30, "xla", 512),
    (48, None, "splash", 0),
    (600, None, "splash", 0),
    (48, 14, "splash", 0),
    (600, 65, "splash", 0),
]


def inputs(length: int):
    """Queries, keys, values, documents (some of one token), and weights of the outputs."""
    rng = np.random.default_rng(length)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(B, n, length, H)), jnp.float32) for n in (N, K, K, N)
    )
    starts = rng.random((B, length)) < 0.05
    starts[:, length // 2 : length // 2 + 2] = True
    return q, k, v, jnp.asarray(np.cumsum(starts, axis=1), jnp.int32), weights


def out_and_gradients(attend, q, k, v, documents, weights):
    def run(*inputs):
        out, pullback = jax.vjp(lambda *x: attend(*x, documents), *inputs)
        return out, *pullback(weights)

    return jax.device_get(jax.jit(run)(q, k, v))


def largest(one, other) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(one, other, strict=True))


def attend(mesh: dict, length: int, window: int | None, backend: str, block: int, packed: bool):
    """The largest difference of the output and gradients to one device's."""
    q, k, v, documents, weights = inputs(length)
    documents = documents if packed else None

    def reference(q, k, v, documents):
        if window is None:
            return blockwise.causal_attention(q, k, v, documents)
        return blockwise.windowed_attention(q, k, v, documents, window)

    def spread(q, k, v, documents):
        return attention.sequence_attention(small_config(), q, k, v, documents, window)

    expected = out_and_gradients(reference, q, k, v, documents, weights)
    with (
        mock.patch.object(attention, "available_backend", return_value=backend),
        mock.patch.multiple(context_parallel, QUERY_BLOCK=block, KEY_BLOCK=block),
        use_mesh(current(mesh)),
    ):
        got = out_and_gradients(spread, q, k, v, documents, weights)
    return largest(expected, got)


def current(mesh: dict):
    return make_mesh(RunConfig(mesh=mesh).mesh, jax.devices()[: int(np.prod([*mesh.values()]))])


def shift(mesh: dict) -> float:
    """The shift between loops, and its gradient."""
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=(B, 24, 3)), jnp.float32) for _ in range(2))
    documents = inputs(24)[3]

    def run(x):
        out, pullback = jax.vjp(lambda x: shift_states(x, documents), x)
        return out, *pullback(weights)

    expected = jax.device_get(jax.jit(run)(x))
    with use_mesh(current(mesh)):
        got = jax.device_get(jax.jit(lambda x: run(x))(x))
    return largest(expected, got)


def main() -> None:
    kernels.make_splash_mha = functools.partial(kernels.make_splash_mha, interpret=True)
    found = {
        name: {"shift": shift(mesh)}
        | {
            f"{kind} {case}": attend(mesh, *case, packed=kind == "packed")
            for case in CASES
            for kind in ("packed", "whole")
            if kind == "packed" or case[2] == "xla"
        }
        for name, mesh in MESHES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
