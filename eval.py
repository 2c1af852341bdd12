"""Evaluates a trained model: python eval.py RUN_OR_CHECKPOINT [--tasks TASK,TASK]."""

import json
from argparse import Namespace

from plt_jax.cli import CommandParser, run_command
from plt_jax.errors import InputError

OF_TASKS = ("limit", "num_fewshot", "include_path")
"""Options of tasks, which the harness spells with hyphens."""
OF_DOCUMENTS = ("corpus", "stride")


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
    parser.add_argument(
        "--loops",
        action="store_true",
        help="what each loop does to states, attention and predictions, instead of the scores; "
        "writes loops.json and a page, loops.html",
    )
    parser.add_argument(
        "--by_document",
        action="store_true",
        help="each document by itself, long ones in windows that overlap; writes documents.json "
        "and documents.jsonl",
    )
    parser.add_argument("--corpus", help="of --by_document: a prepared corpus's held-out documents")
    parser.add_argument("--stride", type=int, help="of --by_document: new tokens of each window")
    parser.add_argument("--sequences", type=int, help="of --loops, evenly spaced; default 16")
    parser.add_argument(
        "--at_loops",
        help="numbers of loops, as 1,2,3, with which the model is evaluated besides its own",
    )
    parser.add_argument("--batch_size", type=int, help="sequences per batch instead of the run's")
    tasks = parser.add_argument_group("tasks", "pip install 'plt_jax[lm_eval]'")
    tasks.add_argument("--tasks", help="names of the harness's tasks or groups, as a,b")
    tasks.add_argument("--suite", help="the PLT paper's tasks: paper_moe or paper_dense")
    tasks.add_argument(
        "--limit", type=int, help="examples of each task, or documents of --by_document"
    )
    tasks.add_argument("--num-fewshot", type=int, help="examples in the prompt; default the task's")
    tasks.add_argument("--include-path", help="a folder of further tasks")
    tasks.add_argument(
        "--run-code",
        action="store_true",
        help="let tasks run the code that the model writes (humaneval, mbpp)",
    )
    arguments = parser.parse_args()
    if named_tasks(arguments) is not None:
        report = run_tasks(arguments)
    elif arguments.loops:
        report = run_loops(arguments)
    else:
        report = run_documents(arguments) if arguments.by_document else run_text(arguments)
    print(report.table())
    print(f"written to {report.path}")


def run_text(arguments: Namespace):
    refuse(arguments, "--tasks and --suite", *OF_TASKS)
    refuse(arguments, "--by_document", *OF_DOCUMENTS)
    refuse(arguments, "--loops", "sequences")
    from plt_jax.evaluation.report import evaluate_trained

    report = evaluate_trained(
        arguments.path, arguments.text, arguments.batch_size, numbers_of(arguments.at_loops)
    )
    print(json.dumps(report.numbers, indent=2))
    return report


def run_documents(arguments: Namespace):
    refuse(arguments, "--tasks and --suite", "num_fewshot", "include_path")
    refuse(arguments, "scores", "at_loops")
    refuse(arguments, "--loops", "sequences")
    from plt_jax.evaluation.documents import evaluate_documents

    return evaluate_documents(
        arguments.path,
        text=arguments.text,
        corpus=arguments.corpus,
        stride=arguments.stride,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
    )


def run_loops(arguments: Namespace):
    refuse(arguments, "--tasks and --suite", *OF_TASKS)
    refuse(arguments, "--by_document", *OF_DOCUMENTS)
    refuse(arguments, "scores", "batch_size", "at_loops")
    from plt_jax.evaluation.loops import SEQUENCES, evaluate_loops

    sequences = SEQUENCES if arguments.sequences is None else arguments.sequences
    return evaluate_loops(arguments.path, arguments.text, sequences)


def run_tasks(arguments: Namespace):
    refuse(arguments, "scores, --by_document and --loops", "text")
    refuse(arguments, "--by_document", *OF_DOCUMENTS)
    refuse(arguments, "scores", "at_loops")
    refuse(arguments, "--loops", "sequences")
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


def refuse(arguments: Namespace, use: str, *names: str) -> None:
    """Raises InputError where one of these options is given, which are for another use."""
    for name in names:
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-") if name in OF_TASKS else name
            raise InputError(f"--{option} is for {use}")


def numbers_of(text: str | None) -> list[int]:
    """The numbers of --at_loops."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise InputError(f"--at_loops is {text}; give numbers, as 1,2,3") from error


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
