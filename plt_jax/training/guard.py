"""Steps that are out of order: which the train step skips, and when skipping is not enough."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from plt_jax.config import GuardConfig

LAG = 2
"""Newest steps that limits, and decisions to go back, leave out: so that they need not wait for
the device, and are the same however often anything is logged."""


class Limits(NamedTuple):
    """The largest values that a step may have; beyond them, or not finite, it changes nothing."""

    loss: np.float32 = np.float32(np.inf)
    """Nats per target."""
    gradient_norm: np.float32 = np.float32(np.inf)
    """Before clipping."""


class Seen(NamedTuple):
    """What a step reported: scalars, on the device until they are needed."""

    loss: Any
    gradient_norm: Any
    skipped: Any
    """1 if it changed nothing, else 0."""


class Guard:
    """What recent steps were like."""

    def __init__(self, config: GuardConfig, state: list[list[float | None]] | None = None):
        """Starts afresh, or from the `state()` of a guard of earlier steps."""
        self._config = config
        self._known: deque[Seen] = deque(maxlen=max(config.window, config.patience))
        self._newest: deque[Seen] = deque()
        self._unreported: list[Any] = []
        for values in state or []:
            self._append(Seen(*(math.nan if value is None else value for value in values)))

    def observe(self, values: dict[str, Any]) -> None:
        """Takes notice of a step's metrics."""
        self._append(Seen(*(values[name] for name in Seen._fields)))
        self._unreported.append(values["skipped"])

    def limits(self) -> Limits:
        """What the next step may have: the median of the window's steps, and so many times their
        median deviation from it, scaled to be a normal distribution's standard deviation."""
        if self._config.spike_deviations is None:
            return Limits()
        window = list(self._known)[-self._config.window :]
        sound = [seen for seen in window if not seen.skipped]
        # A window of nothing but skipped steps has nothing to say; `lost` will.
        if len(window) < self._config.window or not sound:
            return Limits()
        loss, norm, _ = np.array(sound).T
        return Limits(self._limit(loss), self._limit(norm))

    def lost(self) -> bool:
        """Whether so many steps in a row were skipped that no other can be hoped for."""
        last = list(self._known)[-self._config.patience :]
        return len(last) == self._config.patience and all(seen.skipped for seen in last)

    def take_skipped(self) -> int:
        """How many steps were skipped since it was last asked; waits for the newest step."""
        skipped = int(sum(jax.device_get(self._unreported)))
        self._unreported.clear()
        return skipped

    def last(self) -> Seen:
        """The newest of the steps by which `lost` decides."""
        return self._known[-1]

    def forget_skipped(self) -> None:
        """Begins to count anew, where training goes back to a time when steps were skipped."""
        for seen in (self._known, self._newest):
            kept = [one for one in seen if not one.skipped]
            seen.clear()
            seen.extend(kept)

    def state(self) -> list[list[float | None]]:
        """All that there is to know, as JSON; numbers that are not finite become None."""
        return [
            [value if math.isfinite(value) else None for value in map(float, seen)]
            for seen in jax.device_get([*self._known, *self._newest])
        ]

    def _append(self, seen: Seen) -> None:
        self._newest.append(seen)
        if len(self._newest) > LAG:
            self._known.append(Seen(*map(float, jax.device_get(self._newest.popleft()))))

    def _limit(self, values: np.ndarray) -> np.float32:
        median = np.median(values)
        deviation = 1.4826 * np.median(np.abs(values - median))
        return np.float32(median + self._config.spike_deviations * deviation)


def what_is_wrong(values: dict[str, jax.Array], first_layer: int = 0) -> str:
    """Why a step was skipped; names the first router, if any, whose logits are not finite.

    Args:
      first_layer: how many layers come before those with routers.
    """
    broken = np.argwhere(~np.isfinite(values.get("router_z_by_loop", 0.0)))
    where = ""
    if broken.size:
        loop, layer = broken[0] + 1
        where = f" (the first router to fail is that of layer {first_layer + layer} in loop {loop})"
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            return f"the {name} is {float(values[name])}{where}"
    return (
        f"the loss {float(values['loss']):.4g} or the gradient_norm "
        f"{float(values['gradient_norm']):.4g} is above its limit (guard.spike_deviations)"
    )
