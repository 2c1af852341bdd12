"""Evaluates a trained model: python eval.py RUN_OR_CHECKPOINT [--tasks TASK,TASK]."""

from plt_jax.commands.eval import main
from plt_jax.commands.parser import run_command

if __name__ == "__main__":
    run_command(main)
