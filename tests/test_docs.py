"""The docs: their links lead somewhere, what they name exists, and their tested commands run.

The comment `<!-- tested -->` before a code block makes these tests run it, in a folder that has the
repository's configurations and commands. Only sizes differ from what a reader runs; see SIZES.
"""

import functools
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from benchmarks.decode_chart import CHART, draw
from plt_jax.config import RunConfig
from plt_jax.config.yaml_file import annotation_at
from tests.training.runs import REPOSITORY, environment

DOCS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
PAGES = [*DOCS, *sorted((REPOSITORY / "benchmarks" / "results").glob("*.md"))]
NOW = [page for page in DOCS if page.name != "CHANGELOG.md"]
"""Pages that name only what exists today."""

SIZES = {
    "train.py": "--model.vocab_size 300 --model.max_length 64 --model.width 48 --model.layers 1 "
    "--model.layer_unroll 1 --model.ffn_width 48 --training.log_every 2 --data.cache_dir cache",
    "plt_jax.generate": "--max_new_tokens 8",
}
"""Options that are added to a tested command, by command. `--training.steps` is divided by 100."""

FOREIGN = {
    "pytest": {"--dist"},
    "ruff": {"--check"},
    "Slurm": {"--signal"},
    "hf": {"--local-dir"},
    "XLA": {
        "--xla_force_host_platform_device_count",
        "--xla_cpu_enable_concurrency_optimized_scheduler",
    },
}
"""Options of other programs that the docs name."""

OTHER_PARSERS = ("plt_jax.lm_eval",)
"""Commands whose options another package reads."""


class Block(NamedTuple):
    """A fenced code block."""

    page: Path
    line: int
    language: str
    text: str
    tested: bool

    def commands(self) -> list[str]:
        """The shell commands, one a line, without comments."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line.split("   #")[0].strip() for line in joined.splitlines() if line.strip()]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page."""
    found, opened, before = [], None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened = Block(page, number, line[3:].strip(), "", before == "<!-- tested -->")
        elif opened is not None and line == "```":
            found.append(opened)
            opened = None
        elif opened is not None:
            opened = opened._replace(text=f"{opened.text}{line}\n")
        else:
            assert before != "<!-- tested -->", (
                f"{page.name}:{number}: a comment marks no code block"
            )
        before = line
    assert opened is None, f"{opened}: the block does not end"
    return found


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def ticked(page: Path) -> list[str]:
    """What stands in backticks in a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    made: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = [slug, *(f"{slug}-{count}" for count in range(1, 9))]
        made.add(next(name for name in same if name not in made))
    return made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert file.is_relative_to(REPOSITORY), f"{page.name}: {target} is outside the repository"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_named_files_and_modules_exist(page):
    for name in ticked(page):
        if re.search("[A-Z]{4}", name):
            continue  # a placeholder, such as NAME
        if re.fullmatch(r"(plt_jax|tests|configs|benchmarks|docs)/[\w./-]*", name):
            assert (REPOSITORY / name).exists(), f"{page.name}: {name} does not exist"
        if re.fullmatch(r"plt_jax(\.[a-z_]+)+", name):
            assert_importable(name)


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_python_of_the_docs_names_what_exists(page):
    for block in blocks(page):
        for name in re.findall(r"(?<![\w/.])plt_jax(?:\.\w+)+", block.text):
            assert_importable(name)


@pytest.mark.parametrize("name", ["contributing.md", "design.md"])
def test_named_functions_exist(name):
    modules = [*REPOSITORY.glob("plt_jax/**/*.py"), *REPOSITORY.glob("tests/**/*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    words = set(re.findall(r"\w+", source)) | {path.name for path in modules}
    for named in ticked(REPOSITORY / "docs" / name):
        if re.fullmatch(r"_?[A-Za-z]\w{3,}|[a-z_]+\.py", named):
            assert named in words, f"{name}: nothing is called {named}"


def assert_importable(name: str) -> None:
    """A dotted name is a module, or an attribute of one."""
    above, _, last = name.rpartition(".")
    parent = importlib.import_module(above)
    # The module itself is not imported: that of plt_jax.generate would hide the function.
    found = hasattr(parent, "__path__") and importlib.util.find_spec(name)
    assert found or hasattr(parent, last), f"{name} does not exist"


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_named_fields_exist(page):
    sections = "|".join(RunConfig.model_fields)
    for name in ticked(page):
        field = re.fullmatch(rf"(?:--)?((?:{sections})(?:\.[a-z_0-9]+)+)(?: .*)?", name)
        if field and not name.endswith((".json", ".yaml", ".py")):
            assert_field(field[1], page)


def assert_field(name: str, page: Path) -> None:
    try:
        annotation_at(name.split("."))
    except (KeyError, AttributeError):
        pytest.fail(f"{page.name}: the configuration has no field {name}")


def program(command: str) -> tuple[str, list[str]] | None:
    """The script or module that a documented command runs, and its arguments; None for others."""
    match = re.match(
        r"python (?:-m )?(train\.py|eval\.py|(?:plt_jax|benchmarks)[\w.]+)(.*)", command
    )
    if match is None:
        return None
    return match[1], re.sub(r"[{}<>]", "", match[2]).split()


def start(name: str) -> None:
    """Runs a script or module, as `python NAME` or `python -m NAME` does."""
    if name.endswith(".py"):
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


@functools.cache
def help_of(name: str, *words: str) -> str:
    """What a command prints for `WORDS --help`."""
    printed, arguments = io.StringIO(), [name, *words, "--help"]
    argv = mock.patch.object(sys, "argv", arguments)
    with argv, redirect_stdout(printed), pytest.raises(SystemExit) as end:
        start(name)
    assert not end.value.code, f"{' '.join(arguments)} failed"
    return printed.getvalue()


def options_of(name: str, arguments: list[str]) -> set[str]:
    """The options of a command, of its subcommand if the arguments begin with one."""
    text = help_of(name)
    choices = re.search(r"\{([a-z,]+)\} \.\.\.", text)
    if choices and arguments and arguments[0] in choices[1].split(","):
        text = help_of(name, arguments[0])
    return set(re.findall(r"--[\w.-]*\w", text))


def documented() -> list[tuple[str, str, str]]:
    """The commands of the code blocks that this project's parsers read: name, arguments, place."""
    made = set()
    for block in (block for page in NOW for block in blocks(page)):
        for command in block.commands():
            found = program(command)
            if found and found[0] not in OTHER_PARSERS:
                made.add((found[0], " ".join(found[1]), str(block)))
    return sorted(made)


DOCUMENTED = documented()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of modules that are imported already
@pytest.mark.parametrize(("name", "arguments", "where"), DOCUMENTED)
def test_options_of_documented_commands_exist(name, arguments, where):
    for option in re.findall(r"(?<!\S)--[\w.-]*\w", arguments):
        known = options_of(name, arguments.split())
        assert spellings(option) & known, f"{where}: {name} has no {option}"


def spellings(option: str) -> set[str]:
    """An option as it is written, and with underscores: hyphens may stand for them."""
    return {option, "--" + option[2:].replace("-", "_")}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_options_in_prose_exist():
    known = set().union(*FOREIGN.values())
    names = {name for name, _, _ in DOCUMENTED}
    for name in sorted(names):
        text = help_of(name)
        choices = re.search(r"\{([a-z,]+)\} \.\.\.", text)
        for words in [[], *([word] for word in (choices[1].split(",") if choices else []))]:
            known |= options_of(name, words)
    for page in NOW:
        for text in ticked(page):
            for option in re.findall(r"(?<!\S)--[\w.-]*\w", text):
                assert spellings(option) & known, f"{page.name}: no command has {option}"


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_chart_shows_the_committed_results():
    assert CHART.read_text(encoding="utf-8") == draw(), "run python -m benchmarks.decode_chart"


TESTED = [block for page in DOCS for block in blocks(page) if block.tested]
SENTENCE = "My fellow citizens, the state of our {} is strong, and our {} will be stronger. "
WORDS = ["union", "economy", "army", "school", "farm", "road", "river", "court", "bank", "port"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder as a reader has it after the README's first tested block: configurations, commands,
    some text, and runs/mine."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "train.py", "eval.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "my_text").mkdir()
    for number, word in enumerate(WORDS):
        text = "".join(SENTENCE.format(word, other) for other in WORDS) * 3
        (folder / "my_text" / f"{number}.txt").write_text(text, encoding="utf-8")
    first = next(block for block in TESTED if block.page.name == "README.md")
    for command in first.commands():
        run_command(command, folder)
    return folder


def run_command(command: str, folder: Path) -> None:
    """Runs a shell command of the docs, smaller; see SIZES."""
    found = program(command)
    assert found is not None, f"{command}: only commands of this project are tested"
    smaller = re.sub(
        r"(--training\.steps) (\d+)", lambda steps: f"{steps[1]} {int(steps[2]) // 100}", command
    )
    python, *words = shlex.split(smaller)
    assert python == "python"
    run_python([*words, *SIZES.get(found[0], "").split()], folder)


def run_python(words: list[str], folder: Path) -> None:
    """Runs Python in a reader's folder."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"$ python {shlex.join(words)}\n{done.stdout}{done.stderr}"


SHELL = [block for block in TESTED[1:] if block.language != "python"]
COMMANDS = list(dict.fromkeys(command for block in SHELL for command in block.commands()))
"""Those behind the README's first block; what several pages show runs once."""


RUNS = pytest.mark.slow(
    reason="readers run these commands; their programs take half a minute to compile"
)


@RUNS
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, workspace):
    run_command(command, workspace)


PYTHON = sorted({block.page for block in TESTED if block.language == "python"})


@RUNS
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page, workspace):
    tested = [block for block in blocks(page) if block.tested and block.language == "python"]
    script = workspace / f"{page.stem}.py"
    script.write_text("\n".join(block.text for block in tested), encoding="utf-8")
    run_python([script.name], workspace)
