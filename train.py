"""Trains a Parallel Loop Transformer, or resumes a run: python train.py configs/NAME.yaml."""

from plt_jax.commands.parser import run_command
from plt_jax.commands.train import main

if __name__ == "__main__":
    run_command(main)
