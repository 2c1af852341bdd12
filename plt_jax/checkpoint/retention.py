"""Which checkpoints are kept, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping

from plt_jax.config import CheckpointConfig


def reasons_to_keep(
    losses: Mapping[int, float | None], config: CheckpointConfig
) -> dict[int, list[str]]:
    """Why each checkpoint is kept, by step, ascending; an empty list for those that are not.

    Args:
      losses: the validation loss of each checkpoint, in nats per token, by step; None if unknown.
    """
    steps = sorted(losses)
    known = [step for step in steps if losses[step] is not None and math.isfinite(losses[step])]
    # Of equal ones the later.
    best = sorted(known, key=lambda step: (losses[step], -step))[: config.keep_best]
    reasons: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-config.keep :]:
        reasons[step].append("newest")
    for step in best:
        reasons[step].append("best")
    if config.keep_every is not None:
        for step in steps:
            if step % config.keep_every == 0:
                reasons[step].append(f"every {config.keep_every}")
    return reasons
