"""Measurements of this repository alone, `python -m benchmarks.NAME` from a checkout's root."""
