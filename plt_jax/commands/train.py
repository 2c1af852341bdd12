"""Trains a Parallel Loop Transformer, or resumes a run: python train.py configs/NAME.yaml."""

from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser
from plt_jax.errors import EXIT_DONE, EXIT_STOPPED


def main() -> int:
    parser = CommandParser(
        description="Train a Parallel Loop Transformer from a config, or resume its run.",
        epilog="Exit codes: 0 done, 1 failed (a checkpoint cannot be saved, say), 2 bad input, "
        "3 stopped by a signal with the state saved.",
    )
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="go on with a run in a bucket whose last process is known to be gone, without waiting "
        "for a sign of it",
    )
    config = parse_run_config(parser)
    from plt_jax.training.trainer import train  # after parsing: it imports JAX

    outcome = train(config, parser.parse_args().take_over)
    return EXIT_STOPPED if outcome.stopped else EXIT_DONE
