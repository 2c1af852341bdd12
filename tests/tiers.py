"""Parameters of tests of which some cases are fast and the others slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any], reason: str) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, of which all are slow but those that `fast` repeats.

    A tuple is one value for each of several parameters.
    """
    cases = list(cases)
    assert all(case in cases for case in fast), f"{fast} are not all among {cases}"
    slow = pytest.mark.slow(reason=reason)
    return [
        case
        if case in fast
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow)
        for case in cases
    ]
