"""Every benchmark starts as `python -m`, from a checkout or from the package."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

import benchmarks
import plt_jax.benchmarks
from tests.training.runs import REPOSITORY

COMMANDS = (
    "benchmarks.against_commit",
    "benchmarks.bucket_saving",
    "benchmarks.decode_dtypes",
    "benchmarks.data",
    "benchmarks.data_in_bucket",
    "benchmarks.decode_targets",
    "benchmarks.decode_trace",
    "benchmarks.early_exit",
    "benchmarks.faults",
    "benchmarks.grouped",
    "benchmarks.interop",
    "benchmarks.llama_peer",
    "benchmarks.products",
    "benchmarks.recipe",
    "benchmarks.saving",
    "benchmarks.scaling",
    "benchmarks.serve_http",
    "benchmarks.serve_load",
    "benchmarks.shares",
    "benchmarks.speeches_and_code",
    "plt_jax.benchmarks.ablation",
    "plt_jax.benchmarks.decode",
    "plt_jax.benchmarks.serve",
    "plt_jax.benchmarks.train",
)


def test_no_benchmark_is_left_out():
    found = {
        f"{package.__name__}.{path.stem if path.suffix else path.name}"
        for package in (benchmarks, plt_jax.benchmarks)
        for path in Path(package.__path__[0]).iterdir()
        if (path / "__main__.py").exists()
        or (path.suffix == ".py" and "\n    run_command(main)\n" in path.read_text("utf-8"))
    }
    assert found == set(COMMANDS)


@pytest.mark.slow(reason="starts every benchmark")
@pytest.mark.filterwarnings("ignore:.* found in sys.modules")  # each has run as a module before
@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert f"usage: python -m {name} " in capsys.readouterr().out


def test_the_checkouts_benchmarks_are_no_other_package():
    """Several packages of the Python Package Index install a folder called `benchmarks`."""
    spec = importlib.util.find_spec("benchmarks")
    assert spec.origin == str(REPOSITORY / "benchmarks" / "__init__.py")


@pytest.mark.parametrize(
    "script", sorted((REPOSITORY / "benchmarks").glob("*.sh")), ids=lambda path: path.name
)
def test_scripts_name_what_is_there(script):
    text = script.read_text(encoding="utf-8")
    paths = re.findall(r"(?:tests|configs|benchmarks)/[\w/]+\.(?:py|yaml)\b", text)
    assert paths
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    assert set(re.findall(r"-m ([\w.]*benchmarks\.\w+)", text)) <= set(COMMANDS)
