"""Command lines: overrides of the configuration, help, and exit codes."""

import argparse
import os
import re
import subprocess
import sys

import pytest
from pydantic import BaseModel

from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import TRACEBACK, CommandParser, run_command
from plt_jax.config import RunConfig
from plt_jax.errors import InputError


@pytest.fixture(autouse=True)
def pytest_keeps_its_hooks(monkeypatch):
    """Commands of this process do not replace the hooks with which pytest sees failed threads."""
    monkeypatch.setattr("plt_jax.commands.parser.divert_background_traces", lambda: None)


@pytest.fixture
def parse(tmp_path):
    """Parses options behind the name of a config that sets training.steps and clip_norm."""
    path = tmp_path / "name.yaml"
    path.write_text("training: {steps: 5}\noptimizer: {clip_norm: 2.0}", encoding="utf-8")

    def parse(*words: str) -> RunConfig:
        return parse_run_config(CommandParser(prog="train.py"), [str(path), *words])

    return parse


def test_without_options_the_file_decides(parse):
    config = parse()
    assert (config.training.steps, config.optimizer.clip_norm) == (5, 2.0)
    assert config.run_dir == "runs/name"


@pytest.mark.parametrize("words", [["--training.steps=7"], ["--training.steps", "7"]])
def test_options_beat_the_file(parse, words):
    assert parse(*words).training.steps == 7


def test_options_of_every_depth_and_type(parse):
    config = parse(
        *["--run_dir", "my runs/one", "--seed=3", "--model.loop.scheme=clp"],
        *["--model.loop.count", "3", "--model.tied_embeddings", "true", "--mesh.data", "-1"],
        *["--optimizer.learning_rate", "3e-3", "--optimizer.clip_norm", "null"],
        *["--training.sample_prompt", "My fellow Americans, [a, b]: {c}"],
    )
    assert (config.run_dir, config.seed) == ("my runs/one", 3)
    assert (config.model.loop.scheme, config.model.loop.count) == ("clp", 3)
    assert config.model.tied_embeddings is True
    assert config.mesh.data == -1
    assert config.optimizer.learning_rate == 3e-3
    assert config.optimizer.clip_norm is None
    assert config.training.sample_prompt == "My fellow Americans, [a, b]: {c}"
    assert config.training.steps == 5


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model.loop", "text"], "--model.loop text"),
        (["--training", "{steps: 3}"], "--training {steps: 3}"),
        (["--seed", "1", "--data.sources=[{"], "--data.sources [{"),
    ],
)
def test_a_section_or_list_that_is_no_json_is_refused_by_its_name(parse, words, named):
    with pytest.raises(InputError) as refusal:
        parse(*words)
    assert str(refusal.value).startswith(f"{named} is not valid JSON")


def test_text_that_is_not_utf8_is_refused_by_its_field(parse):
    with pytest.raises(InputError, match=r"training\.sample_prompt: '.*' is not UTF-8"):
        parse("--training.sample_prompt", "caf\udce9")
    with pytest.raises(InputError, match=r"data\.source: '.*' is not UTF-8"):
        parse("--data.source", "caf\udce9")


def test_the_last_of_two_equal_options_counts(parse):
    assert parse("--training.steps", "6", "--training.steps", "7").training.steps == 7


def test_no_run_dir_is_the_default_one(parse):
    assert parse("--run_dir", "null").run_dir == "runs/name"


def test_the_environment_is_not_read(parse, monkeypatch):
    monkeypatch.setenv("SEED", "5")
    monkeypatch.setenv("RUN_DIR", "elsewhere")
    assert parse() == parse("--seed", "0", "--run_dir", "runs/name")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--training.step", "5"],
            "unknown option --training.step; did you mean --training.steps?",
        ),
        (["--trainin.steps=5"], "unknown option --trainin.steps; did you mean --training.steps?"),
        (["--zzzzzz", "5"], "unknown option --zzzzzz; see --help for the known ones"),
        (["--training.steps"], "argument --training.steps: expected one argument"),
        (["--training.steps", "many"], "training.steps = 'many': input should be a valid integer"),
        (["--model.heads", "5"], "width 768 is not divisible by heads 5"),
        (["extra"], "unrecognized arguments: extra"),
        (["--model", "5"], "model = 5: input should be a valid dictionary"),
    ],
)
def test_what_cannot_be_parsed_is_refused_in_one_line(parse, words, message):
    with pytest.raises(InputError) as refusal:
        parse(*words)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def parse_words(*words: str) -> argparse.Namespace:
    """Parses words behind a sub-command `go`, which has --batch_size and --text."""
    parser = CommandParser(prog="name")
    command = parser.add_subparsers(dest="command").add_parser("go")
    command.add_argument("--batch_size", type=int)
    command.add_argument("--text")
    return parser.parse_args(["go", *words])


@pytest.mark.parametrize("words", [["--batch-size", "3"], ["--batch-size=3"]])
def test_hyphens_are_read_as_underscores(words):
    assert parse_words(*words).batch_size == 3


def test_hyphens_in_values_stay():
    assert parse_words("--text", "a-b_c").text == "a-b_c"
    assert parse_words("--text=--batch-size").text == "--batch-size"


def test_hyphens_in_options_of_the_configuration_are_read_as_underscores(parse):
    assert parse("--training.batch-size", "7").training.batch_size == 7
    with pytest.raises(InputError, match=r"^--model.rope_scaling .* is not valid JSON"):
        parse("--model.rope-scaling", "{factor: 2")


@pytest.mark.parametrize("word", ["--batch-siz", "--batch_siz", "--bach-size=3"])
def test_an_unknown_option_of_a_sub_command_has_a_hint_with_underscores(word):
    with pytest.raises(InputError) as refusal:
        parse_words(word)
    name = word.partition("=")[0]
    assert str(refusal.value) == f"unknown option {name}; did you mean --batch_size?"


def test_a_refused_value_is_named_with_underscores():
    with pytest.raises(InputError, match="argument --batch_size: invalid int value: 'x'"):
        parse_words("--batch-size", "x")


def test_the_config_is_required_and_must_exist(tmp_path):
    with pytest.raises(InputError, match="required: config"):
        parse_run_config(CommandParser(), [])
    with pytest.raises(InputError, match=r"cannot read the config .*none\.yaml: No such file"):
        parse_run_config(CommandParser(), [str(tmp_path / "none.yaml")])


def fields(section: type[BaseModel], prefix: str = ""):
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def test_help_explains_every_field(parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    # Lines may be broken anywhere, in long words also behind a hyphen.
    words = re.sub(r"\s+", "", text)
    for name, field in fields(RunConfig):
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert f"--{name} " in text, name
        if not is_section:
            assert re.sub(r"\s+", "", field.description) in words, name


def run(main) -> object:
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code


def test_exit_codes_of_what_main_returns():
    assert run(lambda: None) == 0
    assert run(lambda: 0) == 0
    assert run(lambda: 3) == 3


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    def main():
        raise InputError("the field is 3; make it 4")

    assert run(main) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the field is 3; make it 4\n"
    assert captured.out == ""


def test_other_errors_are_not_hidden(monkeypatch, capsys):
    for error in (ValueError, FloatingPointError):
        with pytest.raises(SystemExit, match="1"):
            run_command(lambda error=error: (_ for _ in ()).throw(error("x")))
        assert f"{error.__name__}: x" in capsys.readouterr().err
    monkeypatch.setenv(TRACEBACK, "1")
    # The interpreter prints the traceback and exits with code 1.
    for error in (ValueError, FloatingPointError, KeyboardInterrupt):
        with pytest.raises(error):
            run_command(lambda error=error: (_ for _ in ()).throw(error("x")))


READER_ENDS = """
from plt_jax.commands.parser import run_command

def main():
    print("one")
    for _ in range({lines}):
        print("x" * 100)

run_command(main)
"""


@pytest.mark.parametrize("buffering", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("lines", [1, 10_000], ids=["at the end", "on the way"])
def test_output_that_nobody_reads_any_more_ends_it_silently(lines, buffering):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", READER_ENDS.format(lines=lines)]
    environment = os.environ | {"PYTHONUNBUFFERED": buffering}
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_command_needs_no_output():
    code = "from plt_jax.commands.parser import run_command; run_command(int)"
    command = f"{sys.executable} -c '{code}' >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_broken_elsewhere_is_not_hidden(monkeypatch):
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(BrokenPipeError):
        run_command(lambda: (_ for _ in ()).throw(BrokenPipeError("a socket's")))


FAILING = """
import sys
from plt_jax.commands.parser import run_command

def main():
    {}

run_command(main)
"""


def failing(body, **variables):
    return subprocess.run(
        [sys.executable, "-c", FAILING.format(body), "word"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "failed: ZeroDivisionError: division by zero; "),
        ("open('/no/such/file')", "failed: No such file or directory (/no/such/file); "),
        ("raise RecursionError", "failed: RecursionError; "),
        ("raise MemoryError", "failed: MemoryError; "),
        ("raise BaseException('a\\x1b[31mb')", "failed: BaseException: a\\x1b[31mb; "),
    ],
)
def test_an_error_that_nobody_foresaw_is_one_line(body, message):
    done = failing(body)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line and "PLT_TRACEBACK=1" in line
    assert "Traceback" in failing(body, PLT_TRACEBACK="1").stderr


def test_an_output_that_is_not_utf8_gets_other_characters():
    body = "print('caf\\xe9 \\u65e5')"
    done = failing(body, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\u65e5\n", "")


def test_a_full_output_is_one_line():
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", FAILING.format("print('x' * 100_000)")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line
