"""`python -m plt_jax.serve`: see plt_jax/commands/serve.py."""

from plt_jax.commands.parser import run_command
from plt_jax.commands.serve import main

if __name__ == "__main__":
    run_command(main)
