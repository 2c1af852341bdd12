"""Evaluates a trained model: python eval.py RUN_OR_CHECKPOINT [--tasks TASK,TASK].

OPTIONS declares every option once, with the modes that take it; the parser, the help and the
refusals are made from it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from plt_jax.commands.device_options import DeviceOptions, add_dtype
from plt_jax.commands.parser import CommandParser, integers
from plt_jax.data.corpus import left_out_of
from plt_jax.errors import InputError
from plt_jax.files.paths import check_writable
from plt_jax.files.writing import to_json

if TYPE_CHECKING:  # it imports JAX
    from jax.sharding import Mesh

SCORES = "scores"
EXACT_MATCH = "--exact_match"
BY_DOCUMENT = "--by_document"
LOOPS = "--loops"
EXIT = "--exit"
TASKS = "--tasks and --suite"
"""The modes of evaluation. SCORES is the one without an option that chooses it."""


class Report(Protocol):
    """The outcome of an evaluation."""

    @property
    def path(self) -> Path:
        """The file that holds it."""
        ...

    def table(self) -> str:
        """Its numbers as lines of text."""
        ...


class Mode(NamedTuple):
    """One of the ways to evaluate a model."""

    title: str
    """Heading of its options in --help."""
    description: str
    """Text below that heading."""
    run: Callable[[Namespace, Mesh | None], Report]
    """Evaluates as the arguments say, on a mesh, or on the mode's own choice of devices."""


class Option(NamedTuple):
    """One option of the command."""

    name: str
    modes: tuple[str, ...]
    """The modes that take it."""
    help: str
    type: Callable[[str], Any] = str
    """Converts its value; `bool` is for an option without a value."""
    chooses_mode: bool = False
    """Whether giving it chooses its mode."""


OPTIONS = (
    Option(
        "text",
        (SCORES, BY_DOCUMENT, LOOPS, EXIT),
        "text file, or folder of .txt files, to evaluate on instead of the run's held-out "
        "documents",
    ),
    Option(
        "batch_size",
        (SCORES, EXACT_MATCH, BY_DOCUMENT, EXIT, TASKS),
        "sequences per batch; default the run's evaluation.batch_size",
        int,
    ),
    Option(
        "at_loops",
        (SCORES, EXACT_MATCH),
        "further numbers of loops to evaluate the model with, as 1,2,3",
        integers,
    ),
    Option(
        "limit",
        (EXACT_MATCH, BY_DOCUMENT, TASKS),
        "largest number of problems of each difficulty, of documents, or of examples of each task",
        int,
    ),
    Option(
        "exact_match",
        (EXACT_MATCH,),
        "measure the share of held-out problems that the model answers correctly, by difficulty",
        bool,
        chooses_mode=True,
    ),
    Option(
        "difficulties",
        (EXACT_MATCH,),
        "difficulties to test, as 1,2,8; default data.synthetic.test_difficulties",
        integers,
    ),
    Option(
        "by_document",
        (BY_DOCUMENT,),
        "score each document separately, long ones in overlapping windows",
        bool,
        chooses_mode=True,
    ),
    Option(
        "corpus",
        (BY_DOCUMENT,),
        "folder of a tokenized corpus, whose held-out documents are scored instead of the run's",
    ),
    Option("stride", (BY_DOCUMENT,), "new tokens in each window; default half of the context", int),
    Option(
        "loops",
        (LOOPS,),
        "measure what each loop changes in states, attention and predictions",
        bool,
        chooses_mode=True,
    ),
    Option(
        "sequences",
        (LOOPS,),
        "number of sequences, evenly spaced over the text; default 16",
        int,
    ),
    Option(
        "exit",
        (EXIT,),
        "rules by which a token runs no further loop, as kl:0.01,entropy:0.5,gate",
        chooses_mode=True,
    ),
    Option("tasks", (TASKS,), "names of tasks or groups, as a,b", chooses_mode=True),
    Option(
        "suite",
        (TASKS,),
        "the PLT paper's tasks: paper_moe or paper_dense",
        chooses_mode=True,
    ),
    Option("num_fewshot", (TASKS,), "examples in the prompt; default each task's own number", int),
    Option("include_path", (TASKS,), "folder with further tasks"),
    Option(
        "apply_chat_template",
        (TASKS,),
        "put each prompt into the chat template of an imported model",
        bool,
    ),
    Option(
        "fewshot_as_multiturn",
        (TASKS,),
        "make each example in the prompt a turn of the chat; with --apply_chat_template",
        bool,
    ),
    Option("system_instruction", (TASKS,), "the system's message, or a text before each prompt"),
    Option(
        "run_code",
        (TASKS,),
        "allow tasks to run the code that the model writes (humaneval, mbpp)",
        bool,
    ),
)


def main() -> None:
    parser = make_parser()
    devices = DeviceOptions(parser)
    arguments = parser.parse_args()
    mode = MODES[choose_mode(arguments)]
    if arguments.text is not None and (others := left_out_of(arguments.text)):
        print(f"note: not all files of {arguments.text} are read{others}")
    from plt_jax.distributed import processes  # after parsing: they import JAX
    from plt_jax.runs.names import locate

    mesh = devices.connect(arguments)
    if processes.is_first():
        check_writable(locate(arguments.path).directory)  # where the results will be
    report = mode.run(arguments, mesh)
    devices.finish("the results are written")
    print(report.table())
    print(f"written to {report.path}")


def make_parser() -> CommandParser:
    """The parser of OPTIONS, in whose help each mode has a section."""
    parser = CommandParser(
        description="Evaluate a trained model. By default: loss, perplexity and bits per byte on "
        "held-out text, for the last loop and read out at every loop; writes eval.json in the run "
        "directory. --exact_match, --by_document, --loops, --exit, --tasks and --suite choose "
        "another evaluation."
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    add_dtype(parser, "parameters", "as they are stored")
    sections = {
        mode: parser.add_argument_group(about.title, about.description)
        for mode, about in MODES.items()
        if mode != SCORES
    }
    for option in OPTIONS:
        section, text = parser, f"{option.help} (for {', '.join(option.modes)})"
        if len(option.modes) == 1:
            section, text = sections[option.modes[0]], option.help
        if option.type is bool:
            section.add_argument(f"--{option.name}", action="store_true", help=text)
        else:
            section.add_argument(f"--{option.name}", type=option.type, help=text)
    return parser


def choose_mode(arguments: Namespace) -> str:
    """The mode that the given options choose.

    Raises:
      InputError: the options choose several modes, or one of them is for another mode.
    """
    given = [option for option in OPTIONS if getattr(arguments, option.name) not in (None, False)]
    chosen = {mode: None for option in given if option.chooses_mode for mode in option.modes}
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} exclude one another; give one of them")
    (mode,) = chosen or {SCORES: None}
    for option in given:
        if mode not in option.modes:
            raise InputError(f"--{option.name} is for {', '.join(option.modes)}")
    return mode


def run_scores(arguments: Namespace, mesh: Mesh | None) -> Report:
    from plt_jax.evaluation.scores import evaluate_trained

    report = evaluate_trained(
        arguments.path,
        arguments.text,
        arguments.batch_size,
        arguments.at_loops or [],
        mesh,
        arguments.dtype,
    )
    print(to_json(report.numbers, indent=2))
    return report


def run_exact_match(arguments: Namespace, mesh: Mesh | None) -> Report:
    from plt_jax.evaluation.exact_match import evaluate_exact_match

    return evaluate_exact_match(
        arguments.path,
        arguments.difficulties or [],
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        at_loops=arguments.at_loops or [],
        mesh=mesh,
        dtype=arguments.dtype,
    )


def run_documents(arguments: Namespace, mesh: Mesh | None) -> Report:
    from plt_jax.evaluation.documents import evaluate_documents

    return evaluate_documents(
        arguments.path,
        text=arguments.text,
        corpus=arguments.corpus,
        stride=arguments.stride,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        mesh=mesh,
        dtype=arguments.dtype,
    )


def run_loops(arguments: Namespace, mesh: Mesh | None) -> Report:
    from plt_jax.evaluation.loops import SEQUENCES, evaluate_loops

    sequences = SEQUENCES if arguments.sequences is None else arguments.sequences
    return evaluate_loops(arguments.path, arguments.text, sequences, mesh, arguments.dtype)


def run_exits(arguments: Namespace, mesh: Mesh | None) -> Report:
    from plt_jax.evaluation.exits import evaluate_exits

    return evaluate_exits(
        arguments.path, arguments.exit, arguments.text, arguments.batch_size, mesh, arguments.dtype
    )


def run_tasks(arguments: Namespace, mesh: Mesh | None) -> Report:
    from plt_jax.evaluation.tasks import SUITES, evaluate_tasks

    tasks = arguments.tasks.split(",") if arguments.tasks is not None else []
    if arguments.suite is not None:
        if arguments.suite not in SUITES:
            raise InputError(f"no suite is called {arguments.suite}; there are {', '.join(SUITES)}")
        tasks = [*SUITES[arguments.suite], *filter(None, tasks)]
    return evaluate_tasks(
        arguments.path,
        tasks,
        limit=arguments.limit,
        shots=arguments.num_fewshot,
        include_path=arguments.include_path,
        batch_size=arguments.batch_size,
        run_code=arguments.run_code,
        mesh=mesh,
        dtype=arguments.dtype,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.fewshot_as_multiturn,
        system_instruction=arguments.system_instruction,
    )


MODES = {
    SCORES: Mode("loss, perplexity and bits per byte", "", run_scores),
    EXACT_MATCH: Mode(
        "test set of a run on a synthetic task",
        "Writes exact_match.json.",
        run_exact_match,
    ),
    BY_DOCUMENT: Mode(
        "each document separately", "Writes documents.json and documents.jsonl.", run_documents
    ),
    LOOPS: Mode("what each loop does", "Writes loops.json and a page, loops.html.", run_loops),
    EXIT: Mode("loops that each token needs", "Writes exits.json.", run_exits),
    TASKS: Mode(
        "tasks of the lm-evaluation-harness",
        "Needs pip install 'plt_jax[lm_eval]'; writes tasks.json.",
        run_tasks,
    ),
}
"""All modes, in the order of --help."""
