"""Settings of all tests: compiled programs are kept between runs, products are exact in float32."""

import os
from pathlib import Path

import jax
import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = os.environ.get("PLT_TEST_CACHE") or str(REPOSITORY / ".jax_cache")

jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_default_matmul_precision", "highest")
settings.register_profile("plt_jax", deadline=None)  # no test fails for how long it takes
settings.load_profile("plt_jax")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The run that all tests of a session share; see tests/training/runs.py."""
    from tests.training.runs import finished_run  # imports half of the package

    return finished_run(tmp_path_factory.getbasetemp())
