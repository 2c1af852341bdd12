"""Next-token cross-entropy, of logits and of the states that a head reads.

The logits of all positions are the largest array of training. `head_loss` computes them for a block
of positions at a time, and the gradients of the block in the same turn, so that they are never kept
and never computed twice.

Axes: M positions of a device, m positions of a block, D model width, V vocabulary (a device's part
of it where the vocabulary is spread over devices).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.distributed.axes import (
    batch_axes,
    current_axes,
    dividing_axes,
    mesh_is_active,
)
from plt_jax.model.kernels import traced_platform

BLOCK_LOGITS = {"cpu": 2**26, "gpu": 2**28, "tpu": 2**28}
"""Logits of a block, at most: arrays of 256 MiB in float32 on CPUs, and of 1 GiB elsewhere. Fewer
would cost time, since each block reads and writes the gradient of the head's weight once."""
MIN_POSITIONS = 512
"""Positions of a block, at least, also where they are more than BLOCK_LOGITS logits."""


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each target's negative log-likelihood in nats, and the log-normaliser: float32 [B, T]."""
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return log_z_BT - chosen_BT, log_z_BT


class HeadLoss(NamedTuple):
    """Sums over all positions, float32 scalars, and what they are sums of."""

    loss: jax.Array
    """The weighted sum of negative log-likelihoods in nats, and of squared log-normalisers times
    their weight: what training minimises."""
    nll: jax.Array
    """The first of these two sums, to be reported: it has no gradient."""
    nll_BT: jax.Array
    """Each position's negative log-likelihood, without its weight, to be reported."""


class Gradients(NamedTuple):
    """The gradients of a loss."""

    states: jax.Array
    """[..., D], in the dtype of the states."""
    weights: jax.Array
    """[...], float32."""
    head_DV: jax.Array
    """float32."""


def head_loss(
    states_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float = 0.0,
) -> HeadLoss:
    """The cross-entropy of the head's logits, without an array of all logits.

    Products are in the dtype of the states, and sums in float32. Gradients of logits are rounded to
    the dtype of the states before they are multiplied.

    Args:
      states_BTD: normed states [B, T, D].
      head_DV: the head's weight, float32.
      targets_BT: int32 [B, T].
      weights_BT: float32 [B, T], the weight of each position in the sums.
      z_loss: weight of the squared log-normalisers.
    """
    sums: Any = _head_loss(z_loss, states_BTD, head_DV, targets_BT, weights_BT)
    return HeadLoss(sums.loss, *jax.lax.stop_gradient(sums[1:]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(z_loss: float, states_BTD, head_DV, targets_BT, weights_BT) -> HeadLoss:
    loss, _ = _on_each_device(z_loss, False, states_BTD, head_DV, targets_BT, weights_BT)
    return loss


def _forward(z_loss: float, states_BTD, head_DV, targets_BT, weights_BT) -> tuple[HeadLoss, Any]:
    return _on_each_device(z_loss, True, states_BTD, head_DV, targets_BT, weights_BT)


def _backward(z_loss: float, gradients: Gradients, cotangent: HeadLoss) -> tuple[Any, ...]:
    # The loss is a scalar: so its gradients are known before the cotangent, but for this factor.
    scale = cotangent.loss
    states = (scale * gradients.states).astype(gradients.states.dtype)
    return states, scale * gradients.head_DV, None, scale * gradients.weights


_head_loss.defvjp(_forward, _backward)


def _on_each_device(
    z_loss: float, differentiate: bool, states_BTD, head_DV, targets_BT, weights_BT
) -> tuple[HeadLoss, Gradients | None]:
    """`_sums` of each device's positions and part of the vocabulary, added up over the mesh."""
    head_DV = head_DV.astype(states_BTD.dtype)
    if not mesh_is_active():
        return _sums(z_loss, differentiate, (), states_BTD, head_DV, targets_BT, weights_BT)
    B, T = targets_BT.shape
    rows, length = batch_axes(B), dividing_axes(current_axes("length"), T)
    vocab = dividing_axes(current_axes("vocab"), head_DV.shape[1])
    # Devices that hold parts of the weight's rows get the sums of those rows alone.
    embed = tuple(
        axis
        for axis in dividing_axes(current_axes("embed"), head_DV.shape[0])
        if axis in (*rows, *length)
    )
    others = tuple(axis for axis in (*rows, *length) if axis not in embed)

    def local(*arrays):
        loss, gradients = _sums(z_loss, differentiate, vocab, *arrays)
        total, nll = jax.lax.psum((loss.loss, loss.nll), (*rows, *length))
        loss = HeadLoss(total, nll, loss.nll_BT)
        if gradients is None:
            return loss, None
        gradient_DV = gradients.head_DV
        if embed:
            gradient_DV = jax.lax.psum_scatter(gradient_DV, embed, tiled=True)
        return loss, gradients._replace(head_DV=jax.lax.psum(gradient_DV, others))

    positions: Any = PartitionSpec(rows, length)
    states: Any = PartitionSpec(rows, length, None)
    head: Any = PartitionSpec(embed, vocab)
    whole: Any = PartitionSpec()
    gradients = Gradients(states, positions, head) if differentiate else None
    return jax.shard_map(
        local,
        in_specs=(states, PartitionSpec(None, vocab), positions, positions),
        out_specs=(HeadLoss(whole, whole, positions), gradients),
        check_vma=False,  # the gradients are not derived by JAX
    )(states_BTD, head_DV, targets_BT, weights_BT)


def _sums(
    z_loss: float,
    differentiate: bool,
    vocab: tuple[str, ...],
    states_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[HeadLoss, Gradients | None]:
    """The sums over a device's positions, block by block, and their gradients if asked for.

    Args:
      vocab: the mesh axes over which the vocabulary is spread.
      head_DV: in the dtype of the states.
    """
    (B, T, D), V = states_BTD.shape, head_DV.shape[1]
    M = B * T
    block = partial(_block, z_loss, differentiate, vocab, head_DV)
    positions = (states_BTD.reshape(M, D), targets_BT.reshape(M), weights_BT.reshape(M))
    m, blocks = block_size(M, V)
    if blocks == 1:
        loss, gradients = block(*positions)
    else:
        padded = jax.tree.map(
            lambda x: jnp.pad(x, [(0, m * blocks - M)] + [(0, 0)] * (x.ndim - 1)).reshape(
                blocks, m, *x.shape[1:]
            ),
            positions,
        )

        def add(sums, arrays):
            loss, gradients = block(*arrays)
            made = (loss.loss, loss.nll, gradients and gradients.head_DV)
            kept = gradients and gradients[:2]
            return jax.tree.map(jnp.add, sums, made), (loss.nll_BT, kept)

        zero = jnp.zeros((), jnp.float32)
        zeros = zero, zero, jnp.zeros((D, V), jnp.float32) if differentiate else None
        (total, nll, gradient_DV), (nll_bm, kept) = jax.lax.scan(add, zeros, padded)
        loss = HeadLoss(total, nll, nll_bm.reshape(-1)[:M])
        gradients = None
        if kept is not None and gradient_DV is not None:
            states_bmD, weights_bm = kept
            gradients = Gradients(
                states_bmD.reshape(-1, D)[:M], weights_bm.reshape(-1)[:M], gradient_DV
            )
    loss = loss._replace(nll_BT=loss.nll_BT.reshape(B, T))
    if gradients is None:
        return loss, None
    states_MD = gradients.states
    if vocab:
        states_MD = jax.lax.psum(states_MD.astype(jnp.float32), vocab).astype(states_BTD.dtype)
    weights_BT = gradients.weights.reshape(B, T)
    return loss, gradients._replace(states=states_MD.reshape(B, T, D), weights=weights_BT)


def block_size(positions: int, vocabulary: int) -> tuple[int, int]:
    """The number of positions in a block, and the number of blocks of a device's positions."""
    most = max(BLOCK_LOGITS[traced_platform()] // vocabulary, MIN_POSITIONS)
    blocks = -(-positions // most)
    return -(-positions // blocks), blocks


def _block(
    z_loss: float,
    differentiate: bool,
    vocab: tuple[str, ...],
    head_DV: jax.Array,
    states_mD: jax.Array,
    targets_m: jax.Array,
    weights_m: jax.Array,
) -> tuple[HeadLoss, Gradients | None]:
    """The sums over a block of positions, and their gradients if asked for."""
    logits_mV = jnp.matmul(states_mD, head_DV, preferred_element_type=jnp.float32)
    largest_m = jnp.max(logits_mV, axis=-1)
    if vocab:
        largest_m = jax.lax.pmax(largest_m, vocab)
        targets_m -= jax.lax.axis_index(vocab) * head_DV.shape[1]
    weight_mV = jnp.exp(logits_mV - largest_m[:, None])
    is_target_mV = targets_m[:, None] == jnp.arange(head_DV.shape[1])
    total_m = jnp.sum(weight_mV, axis=-1)
    chosen_m = jnp.sum(jnp.where(is_target_mV, logits_mV, 0.0), axis=-1)
    if vocab:
        total_m, chosen_m = jax.lax.psum((total_m, chosen_m), vocab)
    log_z_m = jnp.log(total_m) + largest_m
    nll_m = log_z_m - chosen_m
    nll = jnp.sum(weights_m * nll_m)
    loss = HeadLoss(nll + z_loss * jnp.sum(weights_m * jnp.square(log_z_m)), nll, nll_m)
    if not differentiate:
        return loss, None
    factor_m = weights_m * (1.0 + 2.0 * z_loss * log_z_m) / total_m
    gradient_mV = factor_m[:, None] * weight_mV - jnp.where(is_target_mV, weights_m[:, None], 0.0)
    gradient_mV = gradient_mV.astype(states_mD.dtype)
    return loss, Gradients(
        jnp.matmul(gradient_mV, head_DV.T, preferred_element_type=jnp.float32).astype(
            jnp.float32 if vocab else states_mD.dtype
        ),
        nll_m + z_loss * jnp.square(log_z_m),
        jnp.matmul(states_mD.T, gradient_mV, preferred_element_type=jnp.float32),
    )
