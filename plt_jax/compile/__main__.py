"""`python -m plt_jax.compile`: see plt_jax/commands/compile.py."""

from plt_jax.commands.compile import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
