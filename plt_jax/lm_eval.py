"""`python -m plt_jax.lm_eval`: see plt_jax/commands/lm_eval.py."""

from plt_jax.commands.lm_eval import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
