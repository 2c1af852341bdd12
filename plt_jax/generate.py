"""`python -m plt_jax.generate`: see plt_jax/commands/generate.py."""

from plt_jax.commands.generate import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
