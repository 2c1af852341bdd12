"""AdamW and Muon, their learning-rate schedule, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from plt_jax.config import ModelConfig, OptimizerConfig
from plt_jax.model.block import block_parameters, stacks_of
from plt_jax.model.layers import Parameter
from plt_jax.model.transformer import top_parameters


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warmup from 0, then the configured decay to `steps`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = round(config.warmup_fraction * steps)
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after, borders = [optax.cosine_decay_schedule(peak, rest, config.final_fraction)], [warmup]
    elif config.schedule == "wsd":
        decay = max(round(config.decay_fraction * steps), 1)
        after = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
        borders = [warmup, steps - decay]
    else:
        after, borders = [optax.constant_schedule(peak)], [warmup]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), *after], borders)


def make_optimizer(
    config: OptimizerConfig, model: ModelConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping by global norm, AdamW or Muon, and decoupled decay of the projections' weights.

    Args:
      schedule: the learning rate by step, from `make_schedule`.
    """
    adam = optax.scale_by_adam(
        config.beta1, config.beta2, config.epsilon, mu_dtype=config.momentum_dtype
    )
    # The states of checkpoints are nested like these two chains.
    optimizer = optax.chain(
        adam if config.name == "adamw" else muon_and(adam, config, model),
        optax.add_decayed_weights(config.weight_decay, decay_mask(model)),
        optax.scale_by_learning_rate(schedule),
    )
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


MUON_RMS = 0.2
"""The root mean square of Muon's updates before the learning rate, about that of AdamW's
(arXiv 2502.16982, section 2.2)."""


def muon_and(
    adam: optax.GradientTransformation, config: OptimizerConfig, model: ModelConfig
) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982) for the matrices of `matrix_axes`, `adam` for all else.

    `optax.contrib.muon` would schedule and decay its two parts apart, and count steps in each.
    """
    axes = matrix_axes(model)
    labels = jax.tree.map(lambda one: "muon" if one else "adam", axes, is_leaf=_is_axes)
    of_matrices = jax.tree.map(lambda one: one or optax.MaskedNode(), axes, is_leaf=_is_axes)
    rate_ratio = (config.muon_learning_rate or config.learning_rate) / config.learning_rate

    def scale(updates: Any, params: Any = None) -> Any:
        def scaled(update: jax.Array, axes: Any) -> jax.Array:
            # An orthogonal [m, n] matrix has the root mean square 1 / sqrt(max(m, n)).
            sides = (
                math.prod(update.shape[axis] for axis in side)
                for side in (axes.reduction_axis, axes.output_axis)
            )
            return rate_ratio * MUON_RMS * math.sqrt(max(sides)) * update

        return jax.tree.map(scaled, updates, of_matrices)

    muon = optax.contrib.scale_by_muon(
        beta=config.muon_momentum,
        mu_dtype=config.momentum_dtype,
        weight_dimension_numbers=lambda updates: of_matrices,
    )
    return optax.partition(
        {"muon": optax.chain(muon, optax.stateless(scale)), "adam": adam}, labels
    )


def matrix_axes(config: ModelConfig) -> dict[str, Any]:
    """The axes of Muon's matrices, as a tree like the parameters; None for parameters without.

    They are the projections of the layers: to and from the model's width, all heads together, each
    layer and each expert by itself. Embeddings, the head and routers are left to AdamW, as usual
    (arXiv 2502.16982), and so are norms, biases and gates.
    """

    def axes_of(parameter: Parameter) -> MuonDimensionNumbers | None:
        names = parameter.axes
        if not parameter.decays or None in names:
            return None
        # The axis 0 of all is that of the layers.
        wide = tuple(i + 1 for i, name in enumerate(names) if name not in ("expert", "embed"))
        width = (names.index("embed") + 1,)
        return MuonDimensionNumbers(*sorted((width, wide)))

    return dict.fromkeys(top_parameters(config)) | {
        name: {
            parameter: axes_of(declared)
            for parameter, declared in block_parameters(config, stack).items()
        }
        for name, stack in stacks_of(config).items()
    }


def _is_axes(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, MuonDimensionNumbers)


def decay_mask(config: ModelConfig) -> dict[str, Any]:
    """Whether each parameter decays, as a tree like the parameters: all decay but norms, gates,
    biases and embeddings."""

    def decays(parameters: dict[str, Parameter]) -> dict[str, bool]:
        return {name: parameter.decays for name, parameter in parameters.items()}

    return decays(top_parameters(config)) | {
        name: decays(block_parameters(config, stack)) for name, stack in stacks_of(config).items()
    }
