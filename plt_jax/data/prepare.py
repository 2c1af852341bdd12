"""`python -m plt_jax.data.prepare`: see plt_jax/commands/prepare.py."""

from plt_jax.commands.parser import run_command
from plt_jax.commands.prepare import main

if __name__ == "__main__":
    run_command(main)
