"""What the backward pass is given, counted in traced programs."""

import jax
import jax.numpy as jnp
import pytest

from plt_jax.compile.activations import depends, kept_activations
from plt_jax.config import MeshConfig, RunConfig
from plt_jax.distributed.mesh import make_mesh
from plt_jax.training.program import TrainProgram

B, T, D, J, V, N, H = 8, 32, 16, 3, 64, 2, 8


def kept(remat: str, loops: int, **training):
    model = {"vocab_size": V, "max_length": T, "width": D, "layers": J, "heads": N, "kv_heads": N}
    model |= {"ffn_width": 24, "remat": remat, "loop": {"scheme": "plt", "count": loops}}
    config = RunConfig(model=model, training={"batch_size": B, **training})
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return kept_activations(TrainProgram.build(config, mesh))


def test_each_loop_adds_its_layers_inputs_and_the_first_its_keys_and_values():
    """With full recomputation a layer keeps its input [B, T, D] alone; loops share K¹ and V¹."""
    one, two, three = (kept("full", loops).layers for loops in (1, 2, 3))
    inputs, keys_values = J * B * T * D * 4, 2 * J * B * N * T * H * 4
    # Besides some states [B, T, D] outside of the layers.
    assert inputs <= one <= inputs + 8 * B * T * D * 4
    assert inputs + keys_values <= two - one <= inputs + keys_values + 8 * B * T * D * 4
    assert inputs <= three - two <= inputs + 8 * B * T * D * 4


def test_recomputation_keeps_less_and_micro_batches_less_still():
    policies = ("full", "attention", "dots", "dots_and_attention", "none")
    layers = [kept(remat, 2).layers for remat in policies]
    assert layers == sorted(set(layers))
    assert kept("full", 2, accumulate=4).layers == layers[0] // 4


def test_no_logits_are_kept_but_the_gradient_of_the_head():
    assert kept("full", 2).head_gradient == D * V * 4
    assert kept("none", 2, accumulate=4).head_gradient == D * V * 4


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_only_what_comes_from_the_marked_inputs_depends_on_them(wrap):
    def function(x, w):
        def body(carried, w):
            carried = carried @ w
            return carried, (w.astype(jnp.bfloat16), carried + 1)

        return jax.lax.scan(body, x, w)[1]

    traced = jax.make_jaxpr(wrap(function))(jnp.ones((4, 4)), jnp.ones((3, 4, 4))).jaxpr
    assert depends(traced, [True, False]) == [False, True]
    assert depends(traced, [False, True]) == [True, True]
    assert depends(traced, [False, False]) == [False, False]
