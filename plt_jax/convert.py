"""`python -m plt_jax.convert`: see plt_jax/commands/convert.py."""

from plt_jax.commands.convert import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
