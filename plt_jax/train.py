"""`python -m plt_jax.train`: see plt_jax/commands/train.py."""

from plt_jax.commands.parser import run_command
from plt_jax.commands.train import main

if __name__ == "__main__":
    run_command(main)
