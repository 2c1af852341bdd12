"""The house: which room may import which. docs/design.md draws it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "plt_jax"

ORDER = (
    "errors",
    "buckets",
    "files",
    "locks",
    "hub",
    "config",
    "distributed",
    "model",
    "data",
    "decoding",
    "checkpoint",
    "interop",
    "runs",
    "reports",
    "evaluation",
    "training",
    "compile",
    "serving",
    "commands",
    "benchmarks",
)
"""Rooms, from the foundation up: each imports itself and those before it alone."""

ENTRANCES = {
    "train.py",
    "eval.py",
    "generate.py",
    "serve.py",
    "convert.py",
    "describe.py",
    "lm_eval.py",
    "compile/__main__.py",
    "checkpoint/__main__.py",
    "data/prepare.py",
    "data/verify.py",
    "training/report.py",
}
"""Files that `python -m` runs, which only call a command; nothing imports them."""


def modules() -> list[Path]:
    files = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    return [path for path in files if path.as_posix() not in {"__init__.py", *ENTRANCES}]


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plt_jax"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("plt_jax.")}
    return found


def test_every_file_has_a_room():
    assert {path.parts[0].removesuffix(".py") for path in modules()} == set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=str)
def test_no_arrow_runs_back_up(path):
    room = ORDER.index(path.parts[0].removesuffix(".py"))
    rooms = {module.split(".")[1] for module in imported(path)}
    # The benchmarks and commands may use the public names, which are those of all rooms.
    public = {name for name in rooms if name not in ORDER}
    assert not public or path.parts[0] in ("commands", "benchmarks")
    assert {name for name in rooms - public if ORDER.index(name) > room} == set()


@pytest.mark.parametrize(
    ("packages", "room"), [("huggingface_hub", "hub"), ("etils|gcsfs|google|fsspec", "buckets")]
)
def test_one_room_knows_a_service(packages, room):
    """Others say what they need by names; without the packages they work with what is here."""
    pattern = rf"(import|from) ({packages})\b"
    knowing = {
        path.parts[0]
        for path in modules()
        if re.search(pattern, (PACKAGE / path).read_text(encoding="utf-8"))
    }
    assert knowing == {room}


@pytest.mark.parametrize("name", sorted(ENTRANCES))
def test_entrances_only_call_a_command(name):
    lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7
    assert lines[2].startswith("from plt_jax.commands.")
