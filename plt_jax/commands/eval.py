"""Evaluates a trained model: python eval.py RUN_OR_CHECKPOINT [--tasks TASK,TASK]."""

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from plt_jax.commands.parser import CommandParser
from plt_jax.errors import InputError

OPTIONS = {
    "scores": ("text", "batch_size", "at_loops"),
    "--exact_match": ("difficulties", "limit", "batch_size", "at_loops"),
    "--by_document": ("text", "corpus", "stride", "limit", "batch_size"),
    "--loops": ("text", "sequences"),
    "--tasks and --suite": ("limit", "num_fewshot", "include_path", "run_code", "batch_size"),
}
"""What each use takes."""
HYPHENS = ("num_fewshot", "include_path", "run_code")
"""Options that the harness spells with hyphens."""


def main() -> None:
    parser = CommandParser(
        description="Loss, perplexity and bits per byte of a trained model on held-out text, for "
        "the last loop and read out at every loop (writes eval.json in the run directory); or one "
        "of --exact_match, --by_document, --loops, --tasks and --suite."
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument(
        "--text",
        help="a text file, or a folder of .txt files, to evaluate on instead of the run's held-out "
        "documents",
    )
    parser.add_argument("--batch_size", type=int, help="sequences per batch instead of the run's")
    parser.add_argument(
        "--at_loops",
        help="numbers of loops, as 1,2,3, with which the model is evaluated besides its own",
    )
    synthetic = parser.add_argument_group("test set of a run on a synthetic task")
    synthetic.add_argument(
        "--exact_match",
        action="store_true",
        help="share of held-out problems answered correctly, by difficulty; writes "
        "exact_match.json",
    )
    synthetic.add_argument(
        "--difficulties",
        help="difficulties to test, as 1,2,8; default data.synthetic.test_difficulties",
    )
    documents = parser.add_argument_group("each document by itself")
    documents.add_argument(
        "--by_document",
        action="store_true",
        help="long documents in windows that overlap; writes documents.json and documents.jsonl",
    )
    documents.add_argument("--corpus", help="a prepared corpus, of its held-out documents")
    documents.add_argument("--stride", type=int, help="new tokens of each window; half the context")
    loops = parser.add_argument_group("what each loop does")
    loops.add_argument(
        "--loops",
        action="store_true",
        help="to states, attention and predictions; writes loops.json and a page, loops.html",
    )
    loops.add_argument("--sequences", type=int, help="evenly spaced over the text; default 16")
    tasks = parser.add_argument_group(
        "tasks of the lm-evaluation-harness", "pip install 'plt_jax[lm_eval]'; writes tasks.json"
    )
    tasks.add_argument("--tasks", help="names of tasks or groups, as a,b")
    tasks.add_argument("--suite", help="the PLT paper's tasks: paper_moe or paper_dense")
    tasks.add_argument(
        "--limit",
        type=int,
        help="examples of each task, documents of --by_document, or problems of each difficulty",
    )
    tasks.add_argument("--num-fewshot", type=int, help="examples in the prompt; default the task's")
    tasks.add_argument("--include-path", help="a folder of further tasks")
    tasks.add_argument(
        "--run-code",
        action="store_true",
        help="let tasks run the code that the model writes (humaneval, mbpp)",
    )
    arguments = parser.parse_args()
    report = chosen_use(arguments)(arguments)
    print(report.table())
    print(f"written to {report.path}")


def chosen_use(arguments: Namespace) -> Callable[[Namespace], Any]:
    """What the model is evaluated by.

    Raises:
      InputError: by two things at once, or with an option that is for another.
    """
    uses = {
        "--tasks and --suite": run_tasks if named_tasks(arguments) is not None else None,
        "--loops": run_loops if arguments.loops else None,
        "--by_document": run_documents if arguments.by_document else None,
        "--exact_match": run_exact_match if arguments.exact_match else None,
    }
    asked = {name: run for name, run in uses.items() if run is not None} or {"scores": run_text}
    (name, run), *others = asked.items()
    if others:
        raise InputError(f"{' and '.join(asked)} exclude one another; give one of them")
    for option in sorted({option for options in OPTIONS.values() for option in options}):
        if option not in OPTIONS[name] and getattr(arguments, option) not in (None, False):
            of = ", ".join(use for use, options in OPTIONS.items() if option in options)
            spelt = option.replace("_", "-") if option in HYPHENS else option
            raise InputError(f"--{spelt} is for {of}")
    return run


def run_text(arguments: Namespace):
    from plt_jax.evaluation.report import evaluate_trained

    report = evaluate_trained(
        arguments.path, arguments.text, arguments.batch_size, numbers_of(arguments, "at_loops")
    )
    print(json.dumps(report.numbers, indent=2))
    return report


def run_documents(arguments: Namespace):
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
    from plt_jax.evaluation.loops import SEQUENCES, evaluate_loops

    sequences = SEQUENCES if arguments.sequences is None else arguments.sequences
    return evaluate_loops(arguments.path, arguments.text, sequences)


def run_exact_match(arguments: Namespace):
    from plt_jax.evaluation.exact_match import evaluate_exact_match

    return evaluate_exact_match(
        arguments.path,
        numbers_of(arguments, "difficulties"),
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        at_loops=numbers_of(arguments, "at_loops"),
    )


def run_tasks(arguments: Namespace):
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


def numbers_of(arguments: Namespace, name: str) -> list[int]:
    """The numbers of an option that takes several, none if it is not given."""
    text = getattr(arguments, name)
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise InputError(f"--{name} is {text}; give numbers, as 1,2,3") from error


def named_tasks(arguments: Namespace) -> list[str] | None:
    """The tasks that are asked for, if there are any."""
    from plt_jax.evaluation.tasks import SUITES

    if arguments.suite is None:
        return None if arguments.tasks is None else arguments.tasks.split(",")
    if arguments.suite not in SUITES:
        raise InputError(f"no suite is called {arguments.suite}; there are {', '.join(SUITES)}")
    more = arguments.tasks.split(",") if arguments.tasks else []
    return [*SUITES[arguments.suite], *more]
