"""The wheel: what it holds, and that its commands run where no checkout can be imported."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.training.runs import (
    REPOSITORY,
    Result,
    environment,
    json_rows,
    make_home,
    tiny_values,
    write_config,
)

pytestmark = pytest.mark.slow(
    reason="builds and installs a wheel, and starts six processes from it"
)

IMPORTED = """
import importlib.util, sys
import plt_jax
print(plt_jax.__file__)
for name in ("tests", "benchmarks"):
    found = importlib.util.find_spec(name)
    print(found and found.origin)
"""


class Installed(NamedTuple):
    """A wheel of this checkout, installed into a folder that holds nothing else."""

    files: list[str]
    """Paths within the wheel."""
    target: Path
    """The folder."""
    user: Path
    """The working directory of the commands, which has a configuration and its text."""

    def run(self, *words: object) -> Result:
        """Runs Python in the working directory, where plt_jax comes from the target folder."""
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.user,
            env=environment(PYTHONPATH=str(self.target)),
            capture_output=True,
            text=True,
            timeout=600,
        )
        return Result(done.returncode, done.stdout, done.stderr)


def pip(*words: object, cwd: Path) -> None:
    """Runs pip without a network."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words), "--no-index", "--no-deps"],
        cwd=cwd,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    home = tmp_path_factory.mktemp("wheel")
    source, target, user = home / "source", home / "target", home / "user"
    # A build leaves its own folders beside the source, so it gets a copy of what it may find.
    source.mkdir()
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("plt_jax", "benchmarks", "tests", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    pip("wheel", "--no-build-isolation", "--wheel-dir", home, source, cwd=home)
    (wheel,) = home.glob("*.whl")
    pip("install", "--target", target, wheel, cwd=home)
    make_home(user)
    write_config(user / "tiny.yaml", tiny_values(user, run_dir="run"))
    with zipfile.ZipFile(wheel) as archive:
        return Installed(archive.namelist(), target, user)


def test_the_wheel_holds_the_package_alone(installed):
    folders = {name.split("/")[0] for name in installed.files}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"plt_jax"}
    modules = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "plt_jax").rglob("*.py")]
    assert {path.as_posix() for path in modules} <= set(installed.files)
    assert (installed.target / "plt_jax" / "py.typed").is_file()
    assert not (installed.target / "tests").exists()
    assert not (installed.target / "benchmarks").exists()


def test_only_the_target_folder_is_imported(installed):
    result = installed.run("-c", IMPORTED)
    assert result.code == 0, result.err
    package, *others = result.out.splitlines()
    assert package == str(installed.target / "plt_jax" / "__init__.py")
    assert not any(str(REPOSITORY) in other for other in others)


def test_a_run_is_described_trained_evaluated_and_sampled(installed):
    described = installed.run("-m", "plt_jax.describe", "tiny.yaml")
    assert described.code == 0, described.err
    assert "plt, 2 loops through 2 layers of width 8" in described.out
    trained = installed.run("-m", "plt_jax.train", "tiny.yaml")
    assert trained.code == 0, trained.err
    assert json_rows(installed.user / "run" / "metrics.jsonl")
    evaluated = installed.run("-m", "plt_jax.eval", "run")
    assert evaluated.code == 0, evaluated.err
    assert (installed.user / "run" / "eval.json").is_file()
    words = ["run", "--prompt", "the peace", "--max_new_tokens", "4"]
    generated = installed.run("-m", "plt_jax.generate", *words)
    assert generated.code == 0, generated.err
    assert "the peace" in generated.out


def test_decoding_is_measured(installed):
    words = ["tiny.yaml", "--context", "8", "--tokens", "2", "--rounds", "1", "--loops", "2"]
    words += ["--schemes", "no_loop,plt", "--out", "measured"]
    result = installed.run("-m", "plt_jax.benchmarks.decode", *words)
    assert result.code == 0, result.err
    assert (installed.user / "measured" / "decode.json").is_file()
