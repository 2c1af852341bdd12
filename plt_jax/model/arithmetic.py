"""Floating-point operations of a step, counted from the configuration loop by loop.

A product-sum counts two. Model FLOPs are those of the mathematics: training costs three forward
passes, and MFU counts these alone. Executed FLOPs are those of the devices: they include what the
backward pass recomputes, and the masked parts of attention's blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from plt_jax.config import ModelConfig, RunConfig
from plt_jax.model.block import stacks_of
from plt_jax.model.costs import (
    LoopFlops,
    flops_by_loop,
    layers_of_loop,
    parts_of_loop,
    readout_flops,
)
from plt_jax.model.kernels import splash_blocks

BACKWARD = 2
"""Cost of the backward pass of products with weights, in forward passes."""
SPLASH_BACKWARD = 3.5
"""Cost of the backward pass of splash attention, in forward passes: seven products instead of two,
since each of its two kernels recomputes the attention weights."""


class StepFlops(NamedTuple):
    """FLOPs of one step, over all devices."""

    by_loop: tuple[int, ...]
    """Model FLOPs of each loop."""
    executed: int
    """FLOPs that the devices execute."""

    @property
    def model(self) -> int:
        """Model FLOPs of all loops."""
        return sum(self.by_loop)


def train_flops(config: RunConfig) -> StepFlops:
    """FLOPs of a train step on TPUs, for sequences of one document."""
    model, T, B = config.model, config.sequence_length, config.training.batch_size
    loops = flops_by_loop(model, T)
    if _reads_every_loop(config):
        read = readout_flops(model, T)
        earlier = [LoopFlops(*map(sum, zip(one, read, strict=True))) for one in loops[:-1]]
        loops = [*earlier, loops[-1]]
    by_loop = tuple((1 + BACKWARD) * B * T * one.total for one in loops)
    keeps_dots = model.remat in ("dots", "dots_and_attention")
    executed = 0
    for index, one in enumerate(loops):
        again = 0 if model.remat == "none" else one.layers
        if keeps_dots:
            again = _expert_flops(model, index)
        executed += B * T * ((1 + BACKWARD) * (one.layers + one.head) + again)
    forwards = (2 if model.remat in ("dots", "full") else 1) + SPLASH_BACKWARD
    attention = sum(B * _attention(config, index) for index in range(model.loop.count))
    return StepFlops(by_loop, round(executed + forwards * attention))


def _reads_every_loop(config: RunConfig) -> bool:
    """Whether the coda and the head read each loop, not the last alone."""
    return bool(config.training.loop_losses) or config.training.exit_entropy is not None


def _expert_flops(model: ModelConfig, loop: int) -> int:
    """Forward FLOPs per token of a loop's routed experts; no remat policy keeps their products."""
    parts = parts_of_loop(model, loop)
    stacks = [stack for stack in stacks_of(model).values() if stack.mixture and stack.part in parts]
    layers = sum(stack.layers for stack in stacks)
    return 6 * model.width * model.moe.expert_width * model.moe.experts_per_token * layers


def _attention(config: RunConfig, loop: int) -> int:
    """Forward FLOPs of a loop's attention over one sequence, in whole blocks."""
    model, T = config.model, config.sequence_length
    block, blocks = splash_blocks(T, None)
    layers = layers_of_loop(model, loop)
    if loop < model.loop.count - 1 and _reads_every_loop(config):
        layers += len(model.layers_in("coda"))
    pairs = layers * block * block * blocks * (blocks + 1) // 2
    if loop > 0 and model.loop.later_attention == "gated":
        block, blocks = splash_blocks(T, model.loop.window)
        behind = -(-(model.loop.window - 1) // block)
        in_window = block * block * sum(min(index, behind) + 1 for index in range(blocks))
        pairs += len(model.looped_layers) * in_window
    return 4 * model.heads * model.head_width * pairs


def decode_flops(model: ModelConfig, batch: int, context: int) -> StepFlops:
    """FLOPs of a decode step.

    Args:
      batch: number of sequences.
      context: positions of the cache. The step attends to all of them, filled or not.
    """
    loops = flops_by_loop(model, 1)
    per_key, looped = 4 * model.heads * model.head_width, len(model.looped_layers)
    by_loop = []
    for index, one in enumerate(loops):
        gated = index > 0 and model.loop.later_attention == "gated"
        keys = layers_of_loop(model, index) * context
        keys += looped * min(model.loop.window, context) if gated else 0
        by_loop.append(batch * (one.layers + one.head + per_key * keys))
    return StepFlops(tuple(by_loop), sum(by_loop))
