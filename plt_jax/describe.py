"""`python -m plt_jax.describe`: see plt_jax/commands/describe.py."""

from plt_jax.commands.describe import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
