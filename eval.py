"""Evaluates a trained model: python eval.py RUN_OR_CHECKPOINT [--tasks TASK,TASK]."""

import json
from argparse import Namespace

from plt_jax.cli import CommandParser, run_command
from plt_jax.errors import InputError


def main() -> None:
    parser = CommandParser(
        description="Loss, perplexity and bits per byte of a trained model on held-out text, for "
        "the last loop and read out at every loop (writes eval.json in the run directory); or, "
        "with --tasks or --suite, tasks of the lm-evaluation-harness (writes tasks.json)."
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument(
        "--text",
        help="a text file, or a folder of .txt files, to evaluate on instead of the run's held-out "
        "documents",
    )
    parser.add_argument("--batch_size", type=int, help="sequences per batch instead of the run's")
    tasks = parser.add_argument_group("tasks", "pip install 'plt_jax[lm_eval]'")
    tasks.add_argument("--tasks", help="names of the harness's tasks or groups, as a,b")
    tasks.add_argument("--suite", help="the PLT paper's tasks: paper_moe or paper_dense")
    tasks.add_argument("--limit", type=int, help="examples of each task; default all")
    tasks.add_argument("--num-fewshot", type=int, help="examples in the prompt; default the task's")
    tasks.add_argument("--include-path", help="a folder of further tasks")
    tasks.add_argument(
        "--run-code",
        action="store_true",
        help="let tasks run the code that the model writes (humaneval, mbpp)",
    )
    arguments = parser.parse_args()
    report = run_text(arguments) if named_tasks(arguments) is None else run_tasks(arguments)
    print(report.table())
    print(f"written to {report.path}")


def run_text(arguments: Namespace):
    for name in ("limit", "num_fewshot", "include_path"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for --tasks and --suite")
    from plt_jax.evaluation.report import evaluate_trained

    report = evaluate_trained(arguments.path, arguments.text, arguments.batch_size)
    print(json.dumps(report.numbers, indent=2))
    return report


def run_tasks(arguments: Namespace):
    if arguments.text is not None:
        raise InputError("--text is not for --tasks and --suite; evaluate on text in another call")
    from plt_jax.evaluation.tasks import evaluate_tasks

    return evaluate_tasks(
        arguments.path,
        named_tasks(arguments),
        limit=arguments.limit,
        shots=arguments.num_fewshot,
        include_path=arguments.include_path,
        batch_size=arguments.batch_size,
        run_code=arguments.run_code,
    )


def named_tasks(arguments: Namespace) -> list[str] | None:
    """The tasks that are asked for, if there are any."""
    from plt_jax.evaluation.tasks import SUITES

    if arguments.suite is None:
        return None if arguments.tasks is None else arguments.tasks.split(",")
    if arguments.suite not in SUITES:
        raise InputError(f"no suite is called {arguments.suite}; there are {', '.join(SUITES)}")
    more = arguments.tasks.split(",") if arguments.tasks else []
    return [*SUITES[arguments.suite], *more]


if __name__ == "__main__":
    run_command(main)
