"""AdamW, its learning-rate schedule, and which parameters decay."""

from __future__ import annotations

from typing import Any

import optax

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
    """Clipping by global norm, then AdamW with decoupled decay of the projections' weights.

    Args:
      schedule: the learning rate by step, from `make_schedule`.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask(model),
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decay_mask(config: ModelConfig) -> dict[str, Any]:
    """Whether each parameter decays, as a tree like the parameters: all decay but norms, gates,
    biases and embeddings."""

    def decays(parameters: dict[str, Parameter]) -> dict[str, bool]:
        return {name: parameter.decays for name, parameter in parameters.items()}

    return decays(top_parameters(config)) | {
        name: decays(block_parameters(config, stack.mixture))
        for name, stack in stacks_of(config).items()
    }
