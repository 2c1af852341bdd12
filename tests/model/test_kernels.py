"""The fused kernels against plain XLA: splash interpreted, and compiled for a TPU that is not here;
cuDNN as far as its lowering; and which of them a configuration gets where."""

import functools
import json
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from plt_jax import Transformer, init_cache, prefill, prepare_for_decode
from plt_jax.config import MeshConfig
from plt_jax.distributed.mesh import abstract_arrays, batch_layout, make_mesh, use_mesh
from plt_jax.errors import InputError
from plt_jax.model import attention, kernels
from plt_jax.model.attention import choose_backend
from plt_jax.model.blockwise import causal_attention, windowed_attention
from plt_jax.model.kernels import (
    available_backend,
    cudnn_attention,
    is_hopper,
    splash_attention,
    splash_blocks,
)
from plt_jax.model.transformer import abstract_params
from tests.models import random_params, random_tokens, small_config
from tests.training.runs import REPOSITORY, environment, simulated

B, N, K, H = 2, 4, 2, 8
TOKENS = jnp.zeros((B, 8), jnp.int32)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs splash attention on the CPU."""
    kernel = functools.partial(kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mha", kernel)


@pytest.fixture
def devices_run(monkeypatch):
    """Has the devices run the kernel that it is called with."""
    return lambda kernel: monkeypatch.setattr(attention, "available_backend", lambda: kernel)


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


@pytest.mark.slow(reason="interprets a TPU kernel")
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(("length", "window"), [(300, None), (600, None), (600, 65), (300, 1)])
def test_splash_is_the_reference(interpreted, length, window, packed):
    *inputs, documents = random_inputs(length)
    documents = documents if packed else None
    weights = jnp.asarray(np.random.default_rng(0).normal(size=inputs[0].shape), jnp.float32)

    def out_and_gradients(attend):
        def run(*inputs):
            out, pullback = jax.vjp(lambda *x: attend(*x, documents, window), *inputs)
            return out, *pullback(weights)

        return jax.jit(run)(*inputs)

    for actual, right in zip(
        out_and_gradients(splash_attention), out_and_gradients(reference), strict=True
    ):
        np.testing.assert_allclose(actual, right, atol=1e-4)


@pytest.mark.slow(reason="interprets a TPU kernel")
def test_the_model_with_splash_is_the_model(interpreted, devices_run):
    devices_run("splash")
    config = small_config("plt", 2, width=32)
    params, tokens = random_params(config), random_tokens(config, B, 40)
    segments = jnp.asarray(np.arange(40) // 15 + np.arange(B)[:, None], jnp.int32)

    def logits(kind):
        model = Transformer(config.model_copy(update={"attention": kind}))
        return jax.jit(model.apply)({"params": params}, tokens, segments)

    np.testing.assert_allclose(logits("splash"), logits("xla"), atol=1e-4)


@pytest.mark.slow(reason="interprets a TPU kernel")
def test_splash_of_bfloat16_rounds_only_what_it_reads_and_writes(interpreted):
    *inputs, documents = random_inputs(100, jnp.bfloat16)
    out = jax.jit(lambda *x: splash_attention(*x, documents, None))(*inputs)
    assert out.dtype == jnp.bfloat16
    exact = causal_attention(*(x.astype(jnp.float32) for x in inputs), documents)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.04)


@pytest.mark.slow(reason="interprets a TPU kernel on simulated devices")
def test_splash_on_a_mesh_is_the_reference():
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.kernels_worker"],
        cwd=REPOSITORY,
        env=environment(**simulated(4)),
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert max(found["differences"]) < 1e-4
    assert found["parts"] == ["(2, 2, 40, 8)"]  # of [4, 4, 40, 8]


@pytest.mark.parametrize("window", [None, 1, 65, 300, 1000])
def test_blocks_hold_the_sequence_and_little_more(window):
    for length in (1, 128, 129, 512, 513, 2048, 8192, 10_000):
        block, blocks = splash_blocks(length, window)
        assert block % 128 == 0 and block <= 512
        assert length <= block * blocks < length + 128 * blocks


def cudnn_calls(function, *shapes):
    """`(name, mask, window, shape of the first result)` of each call to cuDNN of the program."""
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = []
    for line in lowered.splitlines():
        if name := re.search(r"custom_call @__cudnn\$(\w+)", line):
            settings = re.search(r'backend_config = "(\{.*?\})"', line)[1].replace("\\22", '"')
            settings = json.loads(settings)["cudnn_fmha_backend_config"]
            shape = re.search(r"-> \(tensor<([\dx]+)x", line)[1]
            mask, window = settings["mask_type"], settings["sliding_window_length"]
            calls.append((name[1], mask, window, tuple(map(int, shape.split("x")))))
    return calls


@pytest.mark.parametrize("window", [None, 1, 65])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_cudnn_is_called_causally_with_the_window(without_cudnn, window, packed):
    def gradients(q, k, v, documents):
        def total(q, k, v):
            return cudnn_attention(q, k, v, documents if packed else None, window).sum()

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    shapes = [jax.ShapeDtypeStruct((4, n, 33, 16), jnp.bfloat16) for n in (N, K, K)]
    calls = cudnn_calls(gradients, *shapes, jax.ShapeDtypeStruct((4, 33), jnp.int32))
    name = "fmhaScaleBiasSoftmax" if packed else "fmhaSoftmax"
    settings = ("CAUSAL", window or 0, (4, N, 34, 16))  # 0: no window; an even length
    assert calls == [(name, *settings), (f"{name}Backward", *settings)]


@pytest.mark.parametrize(("chunk", "dtype"), [(8, None), (300, None), (8, "int8")])
def test_prefill_gives_cudnn_the_chunk_and_a_mask(without_cudnn, devices_run, chunk, dtype):
    """In blocks of queries, for every layer and loop; a cache in eight bits goes without it."""
    devices_run("cudnn")
    config = small_config("plt", 2, dtype="bfloat16", head_width=16, layers=1)
    declared = random_params(config)
    params, cache = jax.eval_shape(
        lambda: (prepare_for_decode(config, declared), init_cache(config, B, 512, dtype))
    )
    tokens = jax.ShapeDtypeStruct((B, chunk), jnp.int32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    calls = cudnn_calls(functools.partial(prefill, config), params, tokens, lengths, cache)
    block = min(chunk, 256)
    expected = ("fmhaScaleBiasSoftmax", "NO_MASK", 0, (B, config.heads, block, 16))
    assert calls == ([] if dtype == "int8" else [expected] * 2)


def test_packed_windows_are_left_to_xla_beside_cudnn(without_cudnn, devices_run):
    devices_run("cudnn")
    config = small_config("plt", 2, head_width=16, dtype="bfloat16")
    params, tokens = random_params(config), random_tokens(config, B, 40)
    model = Transformer(config)

    def windows(*inputs):
        calls = cudnn_calls(lambda params: model.apply({"params": params}, *inputs), params)
        return [window for _, _, window, _ in calls]

    assert windows(tokens) == [0, 0, config.loop.window]
    assert windows(tokens, jnp.ones_like(tokens)) == [0, 0]


@pytest.fixture(scope="module")
def pod():
    """The mesh of four TPU chips that are not here."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may compile too
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), topology.devices)


@pytest.mark.slow(reason="compiles for a TPU pod")
def test_a_pod_gets_splash_and_compiles_it(pod):
    sizes = {"vocab_size": 32, "max_length": 600, "dtype": "bfloat16"}
    config = small_config("plt", 2, window=65, **sizes)
    model = Transformer(config)

    def loss(params, tokens, segments):
        return model.apply({"params": params}, tokens, segments).mean()

    params = abstract_arrays(abstract_params(config), pod)
    layout = batch_layout(pod, ("batch_size", 4), ("length", 600))
    tokens = jax.ShapeDtypeStruct((4, 600), jnp.int32, sharding=layout.sharding)
    # The precision that the tests ask for is float32's; bfloat16 has no such product on a TPU.
    with use_mesh(pod), jax.default_matmul_precision("default"):
        program = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile().as_text()
    for phase in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{phase}_segmented" in program


@pytest.mark.slow(reason="compiles for a TPU pod")
def test_a_pod_spreads_sequences_and_runs_splash_on_each_part(pod):
    config = small_config("plt", 2, window=65, vocab_size=32, max_length=1100, dtype="bfloat16")
    mesh = make_mesh(MeshConfig(data=1, context=4), pod.devices.ravel())
    params = abstract_arrays(abstract_params(config), mesh)
    layout = batch_layout(mesh, ("batch_size", 2), ("length", 1100))
    tokens = jax.ShapeDtypeStruct((2, 1100), jnp.int32, sharding=layout.sharding)

    def loss(params, tokens, segments):
        return Transformer(config).apply({"params": params}, tokens, segments).mean()

    with use_mesh(mesh), jax.default_matmul_precision("default"):
        program = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile().as_text()
    for phase in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{phase}_segmented" in program
    assert "collective-permute" in program


@pytest.mark.slow(reason="compiles for a TPU pod")
def test_a_pod_exchanges_experts_and_multiplies_them_by_kernels(pod):
    """Forward and backward, of widths that are no multiples of a tile."""
    moe = {"experts": 4, "expert_width": 336, "shared_width": 64, "dense_layers": 1}
    config = small_config("plt", 2, width=192, vocab_size=32, dtype="bfloat16", moe=moe)
    mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=2), pod.devices.ravel())
    params = abstract_arrays(abstract_params(config), mesh)
    layout = batch_layout(mesh, ("batch_size", 4), ("length", 64))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=layout.sharding)

    def loss(params, tokens):
        return Transformer(config).apply({"params": params}, tokens).mean()

    with use_mesh(mesh), jax.default_matmul_precision("default"):
        program = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    assert "ragged-all-to-all" in program
    for kernel in ("gmm", "tgmm"):
        assert f"jit({kernel})/pallas_call" in program


@pytest.mark.parametrize(
    ("settings", "available", "chosen"),
    [
        ({}, "xla", "xla"),
        ({}, "splash", "splash"),
        ({}, "cudnn", "xla"),  # float32
        ({"dtype": "bfloat16", "head_width": 16}, "cudnn", "cudnn"),
        ({"dtype": "bfloat16", "head_width": 4}, "cudnn", "xla"),
        ({"dtype": "bfloat16", "head_width": 136}, "cudnn", "xla"),
        ({"attention": "xla"}, "splash", "xla"),
        ({"attention": "splash"}, "splash", "splash"),
        ({"attention": "cudnn", "dtype": "bfloat16", "head_width": 16}, "cudnn", "cudnn"),
    ],
)
def test_the_choice(devices_run, settings, available, chosen):
    devices_run(available)
    assert choose_backend(small_config(**settings)) == chosen


@pytest.mark.parametrize(
    ("settings", "available", "message"),
    [
        ({"attention": "splash"}, "xla", "needs a TPU; set it to auto or xla"),
        ({"attention": "splash"}, "cudnn", "needs a TPU; set it to auto or xla"),
        (
            {"attention": "cudnn"},
            "xla",
            "needs an NVIDIA GPU of compute capability 8.0 or above and",
        ),
    ],
)
def test_what_the_devices_cannot_run_is_refused_when_traced(
    devices_run, settings, available, message
):
    devices_run(available)
    config = small_config(**settings, dtype="bfloat16", head_width=16)
    with pytest.raises(InputError, match=f"model.attention is {config.attention}, which {message}"):
        jax.eval_shape(Transformer(config).apply, {"params": random_params(config)}, TOKENS)


def test_the_current_mesh_says_which_devices_a_program_is_for(pod):
    assert available_backend() == "xla"
    with use_mesh(pod):
        assert available_backend() == "splash"


class Device(NamedTuple):
    """What is asked of a GPU."""

    platform_version: str
    compute_capability: str

    @property
    def client(self):
        return self


@pytest.mark.parametrize(
    ("device", "available", "hopper"),
    [
        (Device("PJRT C API\ncuda 12090", "9.0"), "cudnn", True),
        (Device("PJRT C API\ncuda 12090", "12.0"), "cudnn", False),
        (Device("PJRT C API\ncuda 12090", "7.5"), "xla", False),
        (Device("PJRT C API\nrocm 60300", "gfx942"), "xla", False),
    ],
)
def test_which_gpus_have_fused_attention(monkeypatch, device, available, hopper):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert available_backend() == available
    assert is_hopper() == hopper
