"""The options of eval.py: which of them choose a mode, and which modes take them."""

import pytest

from plt_jax.commands.eval import MODES, OPTIONS, SCORES, choose_mode, make_parser
from plt_jax.errors import InputError

VALUES = {int: ["3"], bool: [], str: ["a"]}
CHOICES = {
    "--exact_match": ["--exact_match"],
    "--by_document": ["--by_document"],
    "--loops": ["--loops"],
    "--exit": ["--exit", "kl:0.1"],
    "--tasks and --suite": ["--tasks", "a"],
    SCORES: [],
}
"""Words that choose each mode."""


def mode_of(*words: str) -> str:
    return choose_mode(make_parser().parse_args(["run", *words]))


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_chosen_by_its_options(mode):
    assert mode_of(*CHOICES[mode]) == mode


def test_every_option_that_chooses_a_mode_has_one():
    chosen = {mode for option in OPTIONS if option.chooses_mode for mode in option.modes}
    assert chosen == MODES.keys() - {SCORES}
    assert all(len(option.modes) == 1 for option in OPTIONS if option.chooses_mode)
    assert mode_of("--suite", "paper_moe") == mode_of("--suite", "paper_moe", "--tasks", "a")


OF_SOME_MODES = [option for option in OPTIONS if not option.chooses_mode]


@pytest.mark.parametrize("option", OF_SOME_MODES, ids=lambda option: option.name)
@pytest.mark.parametrize("mode", MODES)
def test_an_option_is_taken_by_its_modes_alone(option, mode):
    words = [*CHOICES[mode], f"--{option.name}", *VALUES.get(option.type, ["1,2"])]
    if mode in option.modes:
        assert mode_of(*words) == mode
    else:
        with pytest.raises(InputError) as refusal:
            mode_of(*words)
        assert str(refusal.value) == f"--{option.name} is for {', '.join(option.modes)}"


@pytest.mark.parametrize("name", ["num-fewshot", "include-path", "run-code", "batch-size"])
def test_hyphens_are_read_as_underscores(name):
    value = [] if name == "run-code" else ["3"]
    assert mode_of("--tasks", "a", f"--{name}", *value) == "--tasks and --suite"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--help"])
    words = "".join(capsys.readouterr().out.split())
    for option in OPTIONS:
        assert f"--{option.name}" in words
        assert "".join(option.help.split()) in words
