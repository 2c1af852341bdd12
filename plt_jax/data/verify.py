"""`python -m plt_jax.data.verify`: see plt_jax/commands/verify.py."""

from plt_jax.commands.parser import run_command
from plt_jax.commands.verify import main

if __name__ == "__main__":
    run_command(main)
