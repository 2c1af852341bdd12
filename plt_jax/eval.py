"""`python -m plt_jax.eval`: see plt_jax/commands/eval.py."""

from plt_jax.commands.eval import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
