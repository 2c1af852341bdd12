"""Hugging Face checkpoints in and out, and dense models turned into looped ones."""
