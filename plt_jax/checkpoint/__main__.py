"""`python -m plt_jax.checkpoint`: see plt_jax/commands/checkpoint.py."""

from plt_jax.commands.checkpoint import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
