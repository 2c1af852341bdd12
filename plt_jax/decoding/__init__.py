"""Decoding: the shared cache, prefill, the one-pass step, sampling, generation."""
