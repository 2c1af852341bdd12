"""Settings of all tests: programs are compiled quickly, and kept on disk between runs but not in
memory between files; products are exact in float32; every test is fast, slow or opt-in.

The three tiers are markers, which pyproject.toml explains:

    pytest -m fast      tests of every room, within three minutes on two CPU cores
    pytest              the whole suite; its summary names the opt-in tests that it left out
"""

import ctypes
import dataclasses
import functools
import gc
import os
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = os.environ.get("PLT_TEST_CACHE") or str(REPOSITORY / ".jax_cache")
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Flags of XLA. The tests' programs run for milliseconds and compile for seconds, so LLVM leaves
its passes out; XLA's own passes, which make the program, all run."""
if jax.__version_info__ < (0, 11):
    # XLA's older emitters of CPU code, which compile small programs in two thirds of the time.
    # Later versions do not have them, and end at a flag that they do not know.
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"

# Tracing makes millions of small objects. Python's own thresholds spend a tenth of the suite's time
# on looking through them.
gc.set_threshold(100_000, 50, 100)
# XLA reads them when the first program is compiled.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}".strip()
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_default_matmul_precision", "highest")
settings.register_profile("plt_jax", deadline=None)  # no test fails for how long it takes
settings.load_profile("plt_jax")


LONG = ("distributed", "test_examples.py", "end_to_end", "test_docs.py", "training", "evaluation")
"""Rooms and files whose tests take long. They begin first, so that no process waits at the end for
another that has just begun one of them."""


def _place(item: pytest.Item) -> int:
    """Where in the order of LONG a test belongs."""
    parts = item.path.relative_to(REPOSITORY / "tests").parts
    return LONG.index(parts[0]) if parts[0] in LONG else len(LONG)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests in order, marks one as fast unless it is slow or opt-in, and skips opt-in
    tests that nobody asked for.

    Raises:
      pytest.UsageError: a `slow` marker without a reason, or an `opt_in` one without a variable.
    """
    items.sort(key=_place)
    for item in items:
        slow, opt_in = item.get_closest_marker("slow"), item.get_closest_marker("opt_in")
        if slow and not slow.kwargs.get("reason"):
            raise pytest.UsageError(f"{item.nodeid}: write @pytest.mark.slow(reason=...)")
        if opt_in and not (opt_in.args and opt_in.kwargs.get("reason")):
            raise pytest.UsageError(f"{item.nodeid}: write @pytest.mark.opt_in(NAME, reason=...)")
        if opt_in:
            variable = opt_in.args[0]
            reason = f"opt-in, set {variable}: {opt_in.kwargs['reason']}"
            item.add_marker(pytest.mark.skipif(variable not in os.environ, reason=reason))
        elif not slow:
            item.add_marker(pytest.mark.fast)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees the compiled programs of a file when its last test has ended.

    Hundreds of files' programs would otherwise add up to several gigabytes in each process.
    """
    if nextitem is not None and nextitem.path == item.path:
        return
    _programs.clear()
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":  # the C library keeps what is freed until it is asked for it
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


_programs: dict[Hashable, Any] = {}
"""The train programs of a file's tests, by what they depend on."""

BETWEEN_STEPS = (
    *("log_every", "evaluate_every", "checkpoint_every", "hang_after", "sample_prompt"),
    *("profile_from", "profile_steps", "wandb_project"),
)
"""Fields of TrainingConfig that say what is done between steps, and reach no program."""


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """Trainings of one file that have equal configurations share their program.

    A process trains once, so the trainer builds its program anew; tests train again and again in
    one process, which would trace the model each time, for seconds.
    """
    from plt_jax.training.program import TrainProgram  # imports half of the package

    build = TrainProgram.build

    def build_once(config, mesh):
        training = config.training.model_copy(update=dict.fromkeys(BETWEEN_STEPS))
        seed = config.seed if training.loop_counts else None
        key = (config.model, config.optimizer, training, config.sequence_length, seed, mesh)
        if key not in _programs:
            _programs[key] = build(config, mesh)
        return dataclasses.replace(_programs[key], config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainProgram, "build", build_once)
        yield


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A Hub on this machine, which huggingface_hub asks in this process; nobody is logged in."""
    from tests.hub.server import serving, using

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as hub, using(hub.url, tmp_path_factory.mktemp("hub")):
        yield hub


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The run that all tests of a session share; see tests/training/runs.py."""
    from tests.training.runs import finished_run  # imports half of the package

    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def task_files():
    """Lets lm_eval read the files of its own tasks once, of which every command reads all again,
    for seven seconds."""
    from lm_eval.tasks import _index  # imports half of the world

    read, own = _index.load_yaml, Path(_index.__file__).parent
    read_once = functools.cache(functools.partial(read, resolve_func=False, recursive=True))

    def load(path, **settings):
        usual = settings == {"resolve_func": False, "recursive": True}
        return read_once(path) if usual and own in path.parents else read(path, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index, "load_yaml", load)
        yield


@pytest.fixture(scope="session")
def bucket_server():
    """An emulator of a bucket, which this process and those that it starts use from now on."""
    from benchmarks.faults.bucket_server import BucketServer

    with BucketServer() as server:
        os.environ.update(server.environment)
        yield server


@pytest.fixture
def bucket(bucket_server, request):
    """The path of an empty folder in the emulator's bucket, `gs://runs/NAME`, for one test."""
    yield f"gs://runs/{abs(hash(request.node.nodeid)):x}"
    bucket_server.disturb = lambda _: None
