"""Measurements as commands, python -m plt_jax.benchmarks.NAME: they print tables, write files."""
