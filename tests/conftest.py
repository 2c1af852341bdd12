"""Settings of all tests: compiled programs are kept between runs, products are exact in float32."""

import os
from pathlib import Path

import jax

CACHE = os.environ.get("PLT_TEST_CACHE") or str(Path(__file__).parent.parent / ".jax_cache")

jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_default_matmul_precision", "highest")
