"""Serving: one model, a fixed number of sequence slots, and an OpenAI-compatible face."""
