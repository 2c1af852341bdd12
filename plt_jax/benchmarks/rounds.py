"""Measurements in rounds, in which the things compared are timed in turn."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable

from plt_jax.commands.parser import integers


def interleave(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each timer returns, by round; a first call of each warms up.

    Each round begins with another timer, so that none always follows the same one.
    """
    for timer in timers.values():
        timer()
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in in_turn(timers, turn):
            seconds[name].append(timers[name]())
    return seconds


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """The names in their order, of which each round begins with the next."""
    ordered = list(names)
    first = turn % len(ordered)
    return ordered[first:] + ordered[:first]


def ratios(seconds: list[float], others: list[float]) -> list[float]:
    """Ratios of two timers' seconds, by round."""
    return [one / other for one, other in zip(seconds, others, strict=True)]


def spread(name: str, values: list[float]) -> dict[str, float]:
    """The median as `name`, and the smallest and largest as `name_min` and `name_max`."""
    return {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def positive_integers(text: str) -> list[int]:
    """Parses an option's value: positive whole numbers that are separated by commas.

    Raises:
      argparse.ArgumentTypeError: there is none, or a part is not a whole number of at least 1.
    """
    values = integers(text)
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text} holds a number below 1")
    return values
