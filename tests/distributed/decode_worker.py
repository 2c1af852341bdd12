"""Decoding on eight host devices, with caches split in several ways, against the forward pass of
one; prints what it found as JSON.

Runs in a process of its own: `python -m tests.distributed.decode_worker`.
"""

import functools
import json
import re
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import (
    Sampling,
    decode_step,
    generate,
    init_cache,
    prefill,
    prepare_for_decode,
)
from plt_jax.checkpoint.store import save_params
from plt_jax.config import SCHEMES, MeshConfig, RunConfig
from plt_jax.decoding import fused_attention, mosaic_kernel
from plt_jax.decoding.quantization import dequantize_params, quantize_params
from plt_jax.distributed.mesh import abstract_arrays, make_mesh, shardings_of, use_mesh
from plt_jax.model.transformer import abstract_params
from plt_jax.runs.quantized import QuantizedReader, to_parts
from plt_jax.serving.prefix_cache import PrefixCache
from plt_jax.serving.scheduler import Scheduler
from plt_jax.serving.slots import SlotModel
from tests.decoding import plain_kernel
from tests.models import forward, random_params, random_tokens, small_config
from tests.serving.fake_slots import run_to_end
from tests.serving.test_slots import random_requests

CAPACITY = 16
"""Little more than the tokens, so that every part of a split cache holds some."""
LONG = 1024
"""So large that a gathered cache would stand out."""
CASES = {
    # mesh, batch, and how the cache [B, 2, 16 + 3, 4] is split there, with more slots as needed
    "batch": ({"data": 8}, 8, [1, 2, 19]),
    "heads": ({"data": 4, "tensor": 2}, 4, [1, 1, 19]),
    "sequence": ({"data": 1, "context": 8}, 2, [2, 2, 3]),
    "sequence, where the batch is too small": ({"data": 4, "tensor": 2}, 1, [1, 1, 5]),
    "sequence by fsdp": ({"data": 2, "fsdp": 4}, 2, [1, 2, 5]),
    "all": ({"data": 2, "context": 2, "tensor": 2}, 2, [1, 1, 10]),
}


BATCH = 8


@functools.cache
def forward_logits(config, weights_dtype: str | None) -> tuple[Any, np.ndarray, np.ndarray]:
    """Parameters, tokens [BATCH, 13], and the logits of the forward pass."""
    params, tokens = random_params(config), random_tokens(config, BATCH, 13)
    if weights_dtype:
        params = dequantize_params(quantize_params(params))
    return params, np.asarray(tokens), np.asarray(forward(config)(params, tokens))


def decode(
    mesh: dict,
    batch: int,
    scheme: str,
    loops: int,
    dtype: str | None,
    weights_dtype: str | None = None,
    **settings: Any,
) -> dict:
    """Prefill in two ragged chunks, then steps; the largest difference to the forward pass."""
    config = small_config(scheme, loops, window=3, vocab_size=32, **settings)
    params, tokens, expected = forward_logits(config, weights_dtype)
    tokens, expected = tokens[:batch], expected[:batch]
    difference = 0.0
    with use_mesh(mesh):
        placed = jax.device_put(params, shardings_of(abstract_params(config), mesh))
        weights = prepare_for_decode(config, placed, weights_dtype)
        cache = init_cache(config, batch, CAPACITY, dtype)
        made = cache.keys[0][0]
        first = np.minimum(4 + np.arange(batch) % 2, 5)
        fill, step = (jax.jit(run, static_argnums=0) for run in (prefill, decode_step))
        logits, cache = fill(config, weights, tokens[:, :5], jnp.asarray(first), cache)
        # As wide as the first chunk, and lengths of the same kind, so that it is the same program.
        rest = np.stack([tokens[row, start : start + 5] for row, start in enumerate(first)])
        logits, cache = fill(config, weights, rest, jnp.asarray(np.full(batch, 4)), cache)
        for more in range(3):
            at = first + 4 + more
            got = np.asarray(logits)
            difference = max(difference, np.abs(got - expected[np.arange(batch), at - 1]).max())
            new = jnp.asarray(tokens[np.arange(batch), at])
            logits, cache = step(config, weights, new, cache)
    return {
        "difference": float(difference),
        "made": jax.tree.leaves(made)[0].addressable_shards[0].data.shape[:3],
        "kept": jax.tree.leaves(cache.keys)[0].addressable_shards[0].data.shape[:3],
        "wide weight": [
            array.addressable_shards[0].data.shape
            for array in jax.tree.leaves(weights.layers[0]["down"])
        ],
    }


def gathers(mesh: dict, batch: int) -> dict:
    """The largest gather of a step with a large cache, and the part of it that a device holds."""
    config = small_config("plt", 2, window=3, vocab_size=32)
    with use_mesh(mesh):
        placed = jax.device_put(random_params(config), shardings_of(abstract_params(config), mesh))
        weights, cache = prepare_for_decode(config, placed), init_cache(config, batch, LONG)
        step = jax.jit(decode_step, static_argnums=0)
        program = step.lower(config, weights, jnp.zeros(batch, jnp.int32), cache).compile()
    part = cache.keys[0][0].addressable_shards[0].data.size
    return {"largest gather": largest_gather(program.as_text()), "part": part}


def fused(mesh: dict, batch: int, gate_input: str) -> float:
    """The largest difference of a step by the decode kernel to one by XLA's attention."""
    logits = {}
    for kernel in ("xla", "mosaic"):
        config = small_config(
            "plt",
            2,
            qk_norm=True,
            gate_input=gate_input,
            head_width=64,
            vocab_size=32,
            dtype="bfloat16",
            decode_attention=kernel,
        )
        params, tokens = random_params(config), random_tokens(config, batch, 8)
        with use_mesh(mesh), plain_kernel_for_all():
            placed = jax.device_put(params, shardings_of(abstract_params(config), mesh))
            weights, cache = prepare_for_decode(config, placed), init_cache(config, batch, 11)
            fill, step = (jax.jit(run, static_argnums=0) for run in (prefill, decode_step))
            _, cache = fill(config, weights, tokens[:, :7], 4 + jnp.arange(batch), cache)
            logits[kernel], _ = step(config, weights, tokens[:, 7], cache)
    return float(jnp.max(jnp.abs(logits["xla"] - logits["mosaic"])))


@contextmanager
def plain_kernel_for_all():
    """Lets these devices pass for Hopper GPUs, and plain JAX for the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention, "is_hopper", lambda: True)
        patch.setattr(jax, "__version_info__", (0, 12))
        patch.setattr(mosaic_kernel, "decode_attention", plain_kernel.decode_attention)
        yield


def largest_gather(program: str) -> int:
    """Elements of the largest array that any all-gather of a program makes."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", program)
    tuples = re.findall(r"= \(([^=]*)\) all-gather(?:-start)?\(", program)
    shapes += [shape for group in tuples for shape in re.findall(r"\w+\[([\d,]*)\]", group)]
    return max(
        (int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes), default=0
    )


def generated(mesh: dict) -> list:
    """Tokens drawn under a mesh, and without one."""
    config = small_config("plt", 3, vocab_size=32)
    params = random_params(config)

    def draw(params):
        return generate(
            config, params, [[1, 2, 3], [4]], 6, Sampling(temperature=1.0), jax.random.key(0)
        ).tolist()

    alone = draw(params)
    with use_mesh(mesh):
        placed = jax.device_put(params, shardings_of(abstract_params(config), mesh))
        return [alone, draw(placed)]


def read_quantized(mesh) -> dict:
    """A checkpoint in eight bits, read onto a mesh."""
    config = small_config("plt", 2, vocab_size=32)
    stored = quantize_params(random_params(config))
    with tempfile.TemporaryDirectory() as folder:
        save_params(folder, 0, to_parts(stored))
        reader = QuantizedReader(folder, 0, abstract_arrays(abstract_params(config), mesh))
        found = reader.read(reader.abstract)
    down = found["layers"]["ffn_down"]
    return {
        "equal": jax.tree.all(jax.tree.map(np.array_equal, found, stored)),
        "shards": [array.addressable_shards[0].data.shape for array in jax.tree.leaves(down)],
    }


def served(weights_dtype: str | None = None) -> dict:
    """Texts that two devices serve together, those that `generate` gives alone, and the programs
    that were compiled while they were served."""
    config = small_config("plt", 2, vocab_size=32)
    params = random_params(config)
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    placed = jax.device_put(params, shardings_of(abstract_params(config), mesh))
    with use_mesh(mesh):
        weights = prepare_for_decode(config, placed, weights_dtype)
    model = SlotModel(config, weights, 3, 64, 16, mesh=mesh)
    model.compile()
    requests, compiled = random_requests(6, sampled=True), []

    def listen(event: str, seconds: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(about.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    scheduler = Scheduler(model, PrefixCache(16, 1, 100), 100)
    scheduler.submit(requests)
    run_to_end(scheduler)
    while_served = list(compiled)
    alone = prepare_for_decode(config, params, weights_dtype)
    return {
        "served": [request.listener.ids for request in requests],
        "alone": [generated_alone(config, alone, request) for request in requests],
        "compiled": while_served,
        "compiled alone": compiled,
    }


def generated_alone(config, weights, request) -> list[int]:
    sampling = request.sampling
    key = jax.random.fold_in(jax.random.key(sampling.seed), sampling.choice)
    alike = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
    new = request.max_new_tokens
    return generate(config, weights, [request.prompt], new, alike, key[None])[0].tolist()


def main() -> None:
    meshes = {name: make_mesh(RunConfig(mesh=mesh).mesh) for name, (mesh, _, _) in CASES.items()}
    with redirect_stdout(sys.stderr):
        found = {
            "plt": {
                name: decode(meshes[name], batch, "plt", 2, None) | gathers(meshes[name], batch)
                for name, (_, batch, _) in CASES.items()
            },
            "schemes": {
                scheme: decode(meshes["all"], 2, scheme, 1 if scheme == "no_loop" else 3, None)
                for scheme in SCHEMES
            },
            "of the middle": {
                scheme: decode(
                    meshes["all"], 2, scheme, 3, None, layers=3, first_layer=1, last_layer=1
                )
                for scheme in ("plt", "vanilla_loop")
            },
            "norm over heads": decode(
                meshes["all"], 2, "plt", 2, None, qk_norm=True, qk_norm_over="all_heads"
            ),
            "int8": decode(meshes["sequence"], 2, "plt", 2, "int8"),
            "int8 weights": decode(meshes["all"], 2, "plt", 2, None, "int8"),
            "read": read_quantized(meshes["all"]),
            "served": [served(), served("int8")],
            "generated": generated(meshes["all"]),
            "fused": {
                gate_input: fused(meshes["heads"], 4, gate_input)  # no slots are split there
                for gate_input in ("query", "hidden")
            },
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
