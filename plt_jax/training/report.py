"""`python -m plt_jax.training.report`: see plt_jax/commands/report.py."""

from plt_jax.commands.parser import run_command
from plt_jax.commands.report import main

if __name__ == "__main__":
    run_command(main)
