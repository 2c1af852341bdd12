"""Rounds of measurements: what is compared takes turns; figures are medians with their spread."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable


def interleave(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round, after one that warms up and does not count."""
    for timer in timers.values():
        timer()
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        first = turn % len(timers)
        names = list(timers)
        for name in names[first:] + names[:first]:
            seconds[name].append(timers[name]())
    return seconds


def ratios(seconds: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(seconds, others, strict=True)]


def spread(name: str, values: list[float]) -> dict[str, float]:
    """The median under a name, and the smallest and largest under names of their own."""
    return {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def numbers(text: str) -> list[int]:
    """Positive whole numbers, separated by commas."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text} holds a number below 1")
    return values
