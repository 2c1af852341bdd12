"""Mixtures of experts on eight host devices against one; prints what it found as JSON.

Runs in a process of its own: `python -m tests.distributed.experts_worker`.
"""

import contextlib
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax import Transformer, decode_step, init_cache, prefill, prepare_for_decode
from plt_jax.config import RunConfig
from plt_jax.decoding.quantization import dequantize_params, quantize_params
from plt_jax.distributed.mesh import make_mesh, shardings_of, use_mesh
from plt_jax.model import expert_parallel
from plt_jax.model.expert_parallel import routed_experts
from plt_jax.model.moe import auxiliary_loss, local_experts
from plt_jax.model.transformer import abstract_params
from plt_jax.training.program import TrainProgram
from tests.distributed import worker
from tests.distributed.decode_worker import largest_gather
from tests.models import forward, random_params, random_tokens, small_config

MESHES = {
    "expert 8": {"data": 1, "expert": 8},
    "expert 4 x data 2": {"data": 2, "expert": 4},
    "expert 2 x fsdp 2 x tensor 2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "expert 2 x context 4": {"data": 1, "expert": 2, "context": 4},
}
EXCHANGES = [name for name in MESHES if "context" not in name]
"""Meshes on which single layers with a skewed load are tested."""
MOE = {
    "experts": 8,
    "experts_per_token": 2,
    "expert_width": 8,
    "shared_width": 8,
    "dense_layers": 1,
    "router_z_loss": 0.01,
    "bias_update_rate": 0.01,
}
SKEWED = slice(2, 4)
"""The experts that all tokens choose in one case."""


def train(mesh: dict) -> dict:
    """Two steps of a PLT with one dense layer and one mixture, against one device's."""
    start, expected, against = on_one_device()
    state, metrics = worker.take_steps(train_config(mesh))
    params = worker.named(jax.device_get(state.params))
    experts = worker.named(state.params)["layers.expert_gate"]
    return {
        "metrics": metrics,
        "expected": against,
        "differences": worker.largest_differences(expected, params),
        "moved": worker.largest_differences(expected, start),
        "shard": jax.tree.leaves(experts)[0].addressable_shards[0].data.shape,
        "shape": experts.shape,
    }


def train_config(mesh: dict) -> RunConfig:
    return worker.make_config(mesh, layers=2, moe=MOE)


@functools.cache
def on_one_device():
    config = train_config({})
    state = TrainProgram.build(config, worker.mesh_of(config)).init_state()
    start = worker.named(jax.device_get(state.params))
    state, metrics = worker.take_steps(config)
    return start, worker.named(jax.device_get(state.params)), metrics


def one_layer(mesh: dict) -> dict[str, float]:
    """Outputs, losses and gradients of one mixture, largest relative difference to one device's.

    Its router sends all tokens to two experts. On every mesh that is more than HEADROOM times an
    even share of what their devices take, so that they need more than one round.
    """
    expected = layer_on_one_device()
    with use_mesh(make_mesh(RunConfig(mesh=mesh).mesh)), counted_rounds() as rounds:
        got = run_layer(routed_experts)
        jax.effects_barrier()
    differences = worker.largest_differences(expected, got)
    return {
        name: float(d / (1 + np.abs(expected[name]).max())) for name, d in differences.items()
    } | {
        "load of two experts": float(got["0.1.1.load_X"][SKEWED].sum()),
        "dropped": float(got["0.1.1.dropped"]),
        "rounds": max(rounds),
    }


@functools.cache
def layer_on_one_device() -> dict[str, np.ndarray]:
    return run_layer(local_experts)


def run_layer(routed) -> dict[str, np.ndarray]:
    """What a mixture computes and its gradients, by name."""
    config = small_config(layers=1, moe=MOE | {"dense_layers": 0, "bias_update_rate": None})
    weights = {name: leaf[0] for name, leaf in random_params(config)["layers"].items()}
    x_BTD = jnp.abs(jax.random.normal(jax.random.key(0), (8, 12, config.width)))
    weights["router"] = weights["router"].at[:, SKEWED].add(3.0)

    def loss(weights, x_BTD):
        out_BTD, statistics = routed(config.moe, weights, x_BTD)
        total = jnp.sum(jnp.sin(out_BTD)) + 10 * auxiliary_loss(config.moe, [statistics])
        return total, (out_BTD, statistics)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    return worker.named(jax.device_get(run(weights, x_BTD)))


@contextlib.contextmanager
def counted_rounds():
    """Collects how many rounds each device needs."""
    rounds, original = [], expert_parallel._sum_rounds

    def counting(one_round, needed, most):
        jax.debug.callback(lambda needed: rounds.append(int(needed)), needed)
        return original(one_round, needed, most)

    expert_parallel._sum_rounds = counting
    try:
        yield rounds
    finally:
        expert_parallel._sum_rounds = original


@contextlib.contextmanager
def ragged_transfers():
    """Ragged all-to-alls, which CPUs do not have, put together from gathers."""

    def stand_in(rows, out, left, sent, arrives, received, *, axis_name):
        me = jax.lax.axis_index(axis_name)
        all_rows = jax.lax.all_gather(rows, axis_name)
        left, sent, arrives = (
            jax.lax.all_gather(array, axis_name)[:, me] for array in (left, sent, arrives)
        )
        slot = jnp.arange(out.shape[0])
        for source in range(all_rows.shape[0]):
            offset = slot - arrives[source]
            here = (offset >= 0) & (offset < sent[source])
            taken = all_rows[source][jnp.where(here, left[source] + offset, 0)]
            out = jnp.where(here[:, None], taken, out)
        # The receivers must expect what the senders send.
        return jnp.where(jnp.all(sent == received), out, jnp.nan)

    original = jax.lax.ragged_all_to_all, expert_parallel.traced_platform
    jax.lax.ragged_all_to_all, expert_parallel.traced_platform = stand_in, lambda: "tpu"
    try:
        yield
    finally:
        jax.lax.ragged_all_to_all, expert_parallel.traced_platform = original


def decode(mesh: dict, weights_dtype: str | None = None) -> dict:
    """Prefill and steps with experts on their devices, against the forward pass of one device."""
    config = small_config("plt", 2, moe=MOE, qk_norm=True, vocab_size=32)
    params, tokens = random_params(config), random_tokens(config, 3, 8)
    if weights_dtype:
        params = dequantize_params(quantize_params(params))
    expected = forward(config)(params, tokens)
    mesh = make_mesh(RunConfig(mesh=mesh).mesh)
    placed = jax.device_put(params, shardings_of(abstract_params(config), mesh))
    difference = 0.0
    with use_mesh(mesh):
        weights = prepare_for_decode(config, placed, weights_dtype)
        fill = jax.jit(prefill, static_argnums=0)
        logits, cache = fill(
            config, weights, tokens[:, :5], jnp.full(3, 5), init_cache(config, 3, 12)
        )
        lowered = jax.jit(decode_step, static_argnums=0).lower(config, weights, tokens[:, 0], cache)
        step = lowered.compile()
        for position in range(5, 9):
            got = np.asarray(logits)
            difference = max(difference, np.abs(got - expected[:, position - 1]).max())
            if position < 8:
                logits, cache = step(weights, tokens[:, position], cache)
    experts = weights.layers[1]["expert_gate_up"]
    return {
        "difference": float(difference),
        "shard": jax.tree.leaves(experts)[0].addressable_shards[0].data.shape,
        "largest gather": largest_gather(step.as_text()),
    }


def refusals() -> dict[str, str]:
    def experts():
        moe = MOE | {"experts": 12, "dense_layers": 0}
        config = worker.make_config(MESHES["expert 8"], moe=moe)
        TrainProgram.build(config, make_mesh(config.mesh))

    def batch():
        config = small_config(moe=MOE)
        variables = {"params": random_params(config)}
        with use_mesh(make_mesh(RunConfig(mesh=MESHES["expert 8"]).mesh)):
            run = functools.partial(Transformer(config).apply, tokens=jnp.zeros((3, 4), jnp.int32))
            jax.eval_shape(run, variables)

    return {"experts": worker.refusal(experts), "batch": worker.refusal(batch)}


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        found = {
            "train": {name: train(mesh) for name, mesh in MESHES.items()},
            "decode": {name: decode(mesh) for name, mesh in MESHES.items()},
            "int8 weights": decode(MESHES["expert 2 x fsdp 2 x tensor 2"], "int8"),
            "dense": {name: one_layer(MESHES[name]) for name in EXCHANGES},
            "refusals": refusals(),
        }
        with ragged_transfers():
            found["ragged"] = {name: one_layer(MESHES[name]) for name in EXCHANGES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
