"""Which checkpoints are kept, and for which reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping

from plt_jax.config import CheckpointConfig


def reasons_to_keep(
    losses: Mapping[int, float | None], config: CheckpointConfig
) -> dict[int, list[str]]:
    """The reasons to keep each checkpoint, by step, ascending; [] for those to remove.

    Args:
      losses: the validation loss of each checkpoint, in nats per token, by step; None if unknown.
    """
    steps = sorted(losses)
    # The later of two steps with equal losses is the better one.
    known = [
        (loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)
    ]
    best = [-negative for _, negative in sorted(known)[: config.keep_best]]
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
