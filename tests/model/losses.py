"""Inputs of the head's loss, the loss of all logits, and the meshes that both are compared on."""

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.model.loss import cross_entropy

MESHES = {
    "rows": {"data": 8},
    "sharded parameters": {"data": 4, "fsdp": 2},
    "vocabulary": {"data": 2, "tensor": 4},
    "sequence": {"data": 2, "context": 4},
    "experts": {"data": 4, "expert": 2},
    "all": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
}


def arrays(B, T, D, V, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    return (
        jnp.asarray(random.normal(size=(B, T, D)), dtype),
        jnp.asarray(random.normal(size=(D, V)), jnp.float32),
        jnp.asarray(random.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(random.random((B, T)) * (random.random((B, T)) < 0.7), jnp.float32),
    )


def plain(states_BTD, head_DV, targets_BT, weights_BT, z_loss):
    """The same of all logits, by JAX's own gradients."""
    logits = jnp.einsum(
        "BTD,DV->BTV",
        states_BTD,
        head_DV.astype(states_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    nll_BT, log_z_BT = cross_entropy(logits, targets_BT)
    nll = jnp.sum(nll_BT * weights_BT)
    return nll + z_loss * jnp.sum(jnp.square(log_z_BT) * weights_BT), nll, nll_BT


def with_gradients(loss, *inputs, z_loss=0.0, scale=1.0):
    """The loss and what it is a sum of; gradients of the states, the head and the weights."""
    states, head, targets, weights = inputs

    def scaled(states, head, weights):
        total, *parts = loss(states, head, targets, weights, z_loss)
        return scale * total, (total, *parts)

    gradients, sums = jax.grad(scaled, argnums=(0, 1, 2), has_aux=True)(states, head, weights)
    return sums, gradients
