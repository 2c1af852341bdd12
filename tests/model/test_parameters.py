"""The parameter tree: names, shapes, logical axes, and how it starts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import Transformer
from plt_jax.model.transformer import abstract_params
from tests.models import ALL, small_config

V, D, J, N, K, H, F = 31, 16, 3, 4, 2, 6, 24

LAYER = {
    "attention_norm": (J, D),
    "q": (J, D, N, H),
    "k": (J, D, K, H),
    "v": (J, D, K, H),
    "o": (J, N, H, D),
    "ffn_norm": (J, D),
    "ffn_gate": (J, D, F),
    "ffn_up": (J, D, F),
    "ffn_down": (J, F, D),
}
TOP = {"embedding": (V, D), "final_norm": (D,)}
HEAD = {"head": (D, V)}
GATES = {
    "query": {"gate_weight": (J, N, H), "gate_bias": (J, N)},
    "hidden": {"gate_weight": (J, D, N), "gate_bias": (J, N), "gate_norm": (J, D)},
}


def config_of(scheme, count, **settings):
    return small_config(scheme, count, layers=J, head_width=H, **settings)


def params_of_init(config):
    """The boxed parameters' shapes, as `init` would make them."""
    tokens = jnp.zeros((1, 3), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]


def check_tree(config, top, layer):
    boxed = params_of_init(config)
    assert abstract_params(config) == boxed
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert None not in leaf.names
        assert leaf.value.dtype == jnp.float32
    for leaf in boxed["layers"].values():
        assert leaf.names[0] == "layers" and "layers" not in leaf.names[1:]
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))
    assert shapes == top | {"layers": layer}


@pytest.mark.parametrize("gate_input", ["query", "hidden"])
@pytest.mark.parametrize(("scheme", "count"), [case for case in ALL if case[1] in (1, 3)])
def test_shapes_and_axes(scheme, count, gate_input):
    """Gates are there in the gated schemes alone, and no parameter is there once per loop."""
    gated = scheme in ("plt", "loop_kv_share_window")
    config = config_of(scheme, count, gate_input=gate_input)
    check_tree(config, TOP | HEAD, LAYER | (GATES[gate_input] if gated else {}))


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("moe", [{}, {"experts": 4, "dense_layers": 1, "bias_update_rate": 0.1}])
def test_each_declared_alone_is_what_it_is_among_all(moe):
    config = config_of("plt", 3, moe=moe, qk_norm=True)
    model, key = Transformer(config), jax.random.key(1)
    right = jax.jit(model.init)(key, jnp.zeros((1, 3), jnp.int32))["params"]

    def alone(key):
        return {name: model.init(key, name, method="declare_one")["params"][name] for name in right}

    jax.tree.map(np.testing.assert_array_equal, jax.jit(alone)(key), right)


def test_shapes_and_axes_of_options():
    check_tree(config_of("no_loop", 1, tied_embeddings=True), TOP, LAYER)
    norms = {"q_norm": (J, H), "k_norm": (J, H), "ffn_output_norm": (J, D)}
    config = config_of("clp", 2, qk_norm=True, ffn_output_norm=True, dtype="bfloat16")
    check_tree(config, TOP | HEAD, LAYER | norms)
    biases = {"q_bias": (J, N, H), "k_bias": (J, K, H), "v_bias": (J, K, H), "o_bias": (J, D)}
    config = config_of("clp", 2, qkv_bias=True, output_bias=True)
    check_tree(config, TOP | HEAD, LAYER | biases)


def test_shapes_and_axes_of_other_norms():
    post = {"attention_output_norm": (J, D), "ffn_output_norm": (J, D)}
    norms = {"q_norm": (J, N, H), "k_norm": (J, K, H)}
    layer = {name: shape for name, shape in LAYER.items() if not name.endswith("norm")}
    config = config_of(
        "clp",
        2,
        input_norms=False,
        attention_output_norm=True,
        ffn_output_norm=True,
        qk_norm=True,
        qk_norm_over="all_heads",
        learned_hidden_scale=True,
    )
    check_tree(config, TOP | HEAD | {"hidden_scale": (D,)}, layer | norms | post)


def test_layers_that_do_not_loop_have_no_gates_and_one_loops_biases():
    moe = {"experts": 4, "dense_layers": 2, "bias_update_rate": 0.1}
    config = small_config("plt", 3, layers=4, first_layer=1, last_layer=2, moe=moe, exit_gate=True)
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(params_of_init(config)))
    stacks = {name: stack for name, stack in shapes.items() if isinstance(stack, dict)}
    assert stacks.keys() == {"dense_prelude", "dense_layers", "layers", "coda"}
    assert {name for name, stack in stacks.items() if "gate_weight" in stack} == {
        "dense_layers",
        "layers",
    }
    biases = {name: stack["router_bias"] for name, stack in stacks.items() if "router" in stack}
    assert biases == {"layers": (1, 3, 4), "coda": (1, 1, 4)}
    top = {name: shape for name, shape in shapes.items() if name not in stacks}
    assert top == TOP | HEAD | {"loop_norm": (D,), "exit_gate": (D, 1), "exit_gate_bias": (1,)}
    for changes in ({"last_layer": None}, {"normalize_between_loops": False}):
        loop = {"first_layer": 1, "last_layer": 2} | changes
        assert "loop_norm" not in params_of_init(small_config("plt", 3, layers=4, **loop))


@pytest.mark.parametrize("gate_input", ["query", "hidden"])
def test_start(gate_input):
    """Norms start at one, gates at one half, projections normal by their number of inputs."""
    config = config_of(
        "plt", 2, gate_input=gate_input, qk_norm=True, ffn_output_norm=True, width=64, ffn_width=96
    )
    init = jax.jit(lambda key: Transformer(config).init(key, jnp.zeros((1, 3), jnp.int32)))
    params = nn.unbox(init(jax.random.key(0)))["params"]
    layers = params["layers"]
    for name, value in {**params, **layers}.items():
        if name.endswith("norm"):
            np.testing.assert_array_equal(value, np.ones_like(value))
    for name in ("gate_weight", "gate_bias"):
        np.testing.assert_array_equal(layers[name], np.zeros_like(layers[name]))
    residual = 1 / math.sqrt(2 * J)
    deviations = {
        "q": 64**-0.5,
        "k": 64**-0.5,
        "v": 64**-0.5,
        "o": residual * (N * H) ** -0.5,
        "ffn_gate": 64**-0.5,
        "ffn_up": 64**-0.5,
        "ffn_down": residual * 96**-0.5,
    }
    for name, deviation in deviations.items():
        assert np.std(layers[name]) == pytest.approx(deviation, rel=0.1)
        assert np.std(layers[name][0] - layers[name][1]) == pytest.approx(
            math.sqrt(2) * deviation, rel=0.1
        ), "layers start different"
    assert np.std(params["embedding"]) == pytest.approx(1.0, rel=0.1)
    assert np.std(params["head"]) == pytest.approx(64**-0.5, rel=0.1)
    same = nn.unbox(init(jax.random.key(0)))["params"]
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_tied_embedding_starts_as_a_head():
    """Its logits must start small; untied, it is as large as normed states."""
    config = config_of("no_loop", 1, tied_embeddings=True, width=64)
    init = jax.jit(lambda key: Transformer(config).init(key, jnp.zeros((1, 3), jnp.int32)))
    embedding = nn.unbox(init(jax.random.key(0)))["params"]["embedding"]
    assert np.std(embedding) == pytest.approx(64**-0.5, rel=0.1)


def test_a_seed_draws_what_it_always_drew():
    """Numbers that runs of seed 0 began with in earlier versions."""

    def drawn(name):
        variables = Transformer(small_config()).init(jax.random.key(0), name, method="declare_one")
        return nn.unbox(variables["params"][name])

    assert drawn("embedding")[3, 5] == pytest.approx(-0.58984685)
    assert drawn("layers")["q"][:, 2, 1, 3] == pytest.approx(np.array([-0.20455182, -0.23876008]))
