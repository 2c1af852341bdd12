"""Evaluates a trained model: python eval.py RUN_OR_CHECKPOINT."""

import json

from plt_jax.cli import CommandParser, run_command


def main() -> None:
    parser = CommandParser(
        description="Loss, perplexity and bits per byte of a trained model on held-out text, for "
        "the last loop and read out at every loop. Writes eval.json in the run directory."
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument(
        "--text",
        help="a text file, or a folder of .txt files, to evaluate on instead of the run's held-out "
        "documents",
    )
    parser.add_argument("--batch_size", type=int, help="sequences per batch instead of the run's")
    arguments = parser.parse_args()
    from plt_jax.evaluation.report import evaluate_trained

    report = evaluate_trained(arguments.path, arguments.text, arguments.batch_size)
    print(json.dumps(report.numbers, indent=2))
    print(report.table())
    print(f"written to {report.path}")


if __name__ == "__main__":
    run_command(main)
