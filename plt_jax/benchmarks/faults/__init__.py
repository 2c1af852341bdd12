"""A campaign of faults against training runs: `python -m plt_jax.benchmarks.faults`."""
