"""Evaluation of trained models on text."""
