"""Ahead-of-time compiles for TPU slices, on machines without a TPU, and their analysis."""
