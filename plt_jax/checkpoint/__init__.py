"""Checkpoints on disk: written, checked, kept or removed, and read."""
