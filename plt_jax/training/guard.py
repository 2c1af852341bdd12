"""Loss spikes and steps that are not finite: which steps are skipped, and when to roll back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from plt_jax.config import GuardConfig

LAG = 2
"""Number of the newest steps that limits and rollbacks do not depend on.

They then need not wait for the device, and are the same however often metrics are logged."""


class Limits(NamedTuple):
    """The largest values that a step may have; a step above them, or not finite, is skipped."""

    loss: np.float32 = np.float32(np.inf)
    """Nats per target."""
    gradient_norm: np.float32 = np.float32(np.inf)
    """Before clipping."""


class StepSummary(NamedTuple):
    """What the guard knows of a step: scalars, on the device until they are needed."""

    loss: Any
    gradient_norm: Any
    skipped: Any
    """1 if the step was skipped, else 0."""


class Guard:
    """Watches the steps: computes the limits of the next one, and asks for rollbacks."""

    def __init__(self, config: GuardConfig, state: list[list[float | None]] | None = None):
        """
        Args:
          state: what `state()` of a guard of earlier steps has returned; None for a fresh guard.
        """
        self._config = config
        self._decided: deque[StepSummary] = deque(maxlen=max(config.window, config.patience))
        self._newest: deque[StepSummary] = deque()
        self._unreported: list[Any] = []
        for values in state or []:
            self._append(StepSummary(*(math.nan if value is None else value for value in values)))

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of the step after those observed before."""
        self._append(StepSummary(*(metrics[name] for name in StepSummary._fields)))
        self._unreported.append(metrics["skipped"])

    def limits(self) -> Limits:
        """The limits of the next step.

        A limit is the median of the window's steps, plus `spike_deviations` times their median
        absolute deviation, scaled to estimate a normal distribution's standard deviation. There is
        no limit until the window is full.
        """
        if self._config.spike_deviations is None:
            return Limits()
        window = list(self._decided)[-self._config.window :]
        sound = [seen for seen in window if not seen.skipped]
        # A window of skipped steps alone gives no limit; `should_roll_back` decides there.
        if len(window) < self._config.window or not sound:
            return Limits()
        loss, norm, _ = np.array(sound).T
        return Limits(self._limit(loss), self._limit(norm))

    def should_roll_back(self) -> bool:
        """Whether the last `patience` steps, but for the newest `LAG`, were all skipped."""
        last = list(self._decided)[-self._config.patience :]
        return len(last) == self._config.patience and all(seen.skipped for seen in last)

    def take_skipped(self) -> int:
        """Number of steps skipped since the last call; waits for the newest step."""
        skipped = int(sum(jax.device_get(self._unreported)))
        self._unreported.clear()
        return skipped

    def decisive_step(self) -> StepSummary:
        """The newest of the steps that `should_roll_back` decides by."""
        return self._decided[-1]

    def forget_skipped(self) -> None:
        """Drops the skipped steps, so that those before the checkpoint of a rollback do not ask for
        another one."""
        for seen in (self._decided, self._newest):
            kept = [one for one in seen if not one.skipped]
            seen.clear()
            seen.extend(kept)

    def state(self) -> list[list[float | None]]:
        """The steps as JSON, for a checkpoint; numbers that are not finite become None."""
        return [
            [value if math.isfinite(value) else None for value in map(float, seen)]
            for seen in jax.device_get([*self._decided, *self._newest])
        ]

    def _append(self, seen: StepSummary) -> None:
        self._newest.append(seen)
        if len(self._newest) > LAG:
            self._decided.append(StepSummary(*map(float, jax.device_get(self._newest.popleft()))))

    def _limit(self, values: np.ndarray) -> np.float32:
        median = np.median(values)
        deviation = 1.4826 * np.median(np.abs(values - median))
        return np.float32(median + self._config.spike_deviations * deviation)


def describe_skip(metrics: Mapping[str, Any], first_layer: int = 0) -> str:
    """Why a step was skipped; names the first router whose logits are not finite, if there is one.

    Args:
      metrics: those of the step.
      first_layer: the layer of the first router, counted from 0.
    """
    broken = np.argwhere(~np.isfinite(metrics.get("router_z_by_loop", 0.0)))
    where = ""
    if broken.size:
        loop, layer = broken[0] + 1
        where = f" (the first router to fail is that of layer {first_layer + layer} in loop {loop})"
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(metrics[name]):
            return f"the {name} is {float(metrics[name])}{where}"
    return (
        f"the loss {float(metrics['loss']):.4g} or the gradient_norm "
        f"{float(metrics['gradient_norm']):.4g} is above its limit (guard.spike_deviations)"
    )
