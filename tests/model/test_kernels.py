"""The fused kernels against plain XLA: splash interpreted, and compiled for a TPU that is not here;
cuDNN as far as its lowering; and which of them a configuration gets where."""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from plt_jax import Transformer
from plt_jax.config import MeshConfig
from plt_jax.errors import InputError
from plt_jax.model import attention, kernels
from plt_jax.model.attention import causal_attention, choose_backend, windowed_attention
from plt_jax.model.kernels import cudnn_attention, splash_attention, splash_blocks
from plt_jax.model.transformer import abstract_params
from plt_jax.sharding import abstract_arrays, make_mesh, use_mesh
from tests.models import compiled, random_params, random_tokens, small_config

B, N, K, H = 2, 4, 2, 8


@pytest.fixture
def interpreted(monkeypatch):
    """Runs splash attention on the CPU."""
    kernel = functools.partial(kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mha", kernel)


@pytest.fixture
def devices_run(monkeypatch):
    """Has the devices run the kernel that it is called with."""
    return lambda kernel: monkeypatch.setattr(attention, "available_kernel", lambda: kernel)


@pytest.fixture
def without_cudnn(monkeypatch):
    """Lowers for cuDNN on a machine that has none."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)


def random_inputs(length, dtype=jnp.float32):
    """Queries [B, N, T, H], keys and values [B, K, T, H], documents [B, T], some of one token."""
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(B, n, length, H)), dtype) for n in (N, K, K))
    starts = rng.random((B, length)) < 0.02
    starts[:, length // 2 : length // 2 + 2] = True
    return q, k, v, jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def reference(q, k, v, documents, window):
    if window is None:
        return causal_attention(q, k, v, documents)
    return windowed_attention(q, k, v, documents, window)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("length", "window"), [(300, None), (600, None), (300, 65), (600, 65), (600, 1)]
)
def test_splash_is_the_reference(interpreted, length, window, packed):
    *inputs, documents = random_inputs(length)
    documents = documents if packed else None
    weights = jnp.asarray(np.random.default_rng(0).normal(size=inputs[0].shape), jnp.float32)

    def out_and_gradients(attend):
        def run(*inputs):
            out, pullback = jax.vjp(lambda *x: attend(*x, documents, window), *inputs)
            return out, *pullback(weights)

        return compiled(run)(*inputs)

    for actual, right in zip(
        out_and_gradients(splash_attention), out_and_gradients(reference), strict=True
    ):
        np.testing.assert_allclose(actual, right, atol=1e-4)
