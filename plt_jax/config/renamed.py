"""Fields of the configuration that have changed their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"data.questions": "data.synthetic"}
"""The present dotted name of each renamed field, by its old one."""


def present_name(name: str) -> str | None:
    """The present dotted name of a field, or None if the given name is not an old one."""
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames fields in the nested values of a run directory's config.yaml, which an earlier
    version may have written."""
    present = dict(values)
    for old, new in RENAMED.items():
        _move(present, old.split("."), new.split("."))
    return present


def _move(values: dict[str, Any], old: list[str], new: list[str]) -> None:
    """Moves the value at the path `old` to the path `new`; the arguments' sections are copied."""
    found: Any = values
    for name in old:
        if not isinstance(found, Mapping) or name not in found:
            return
        found = found[name]
    del _section(values, old[:-1])[old[-1]]
    _section(values, new[:-1])[new[-1]] = found


def _section(values: dict[str, Any], path: list[str]) -> dict[str, Any]:
    for name in path:
        values[name] = dict(values.get(name) or {})
        values = values[name]
    return values
