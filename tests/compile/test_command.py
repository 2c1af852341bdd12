"""The command: what it refuses, in one line and before any work on devices."""

import subprocess
import sys

import pytest

from plt_jax.commands.compile import main
from plt_jax.compile import program
from plt_jax.errors import InputError
from tests.training.runs import REPOSITORY, environment

TINY = str(REPOSITORY / "configs" / "tiny.yaml")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology", "v5p"], "form CHIP:SHAPE"),
        (["--topology", "v8:4x4"], "unknown chip v8"),
        (["--topology", "v5e:5x5"], "v5e has slices of"),
        (["--topology", "v5e:2x2", "--slices", "0"], "--slices is 0"),
        (["--topology", "v5e:2x2", "--slices", "two"], "invalid int value"),
        (["--topology", "v5e:2x2", "--batch", "4"], "--batch is an option of decoding"),
        (["--topology", "v5e:2x2", "--context", "4"], "--context is an option of decoding"),
        (["--topology", "v5e:2x2", "--decode", "--batch", "0"], "--batch is 0"),
        (["--topology", "v5e:2x2", "--decode", "--batch", "1,2"], "one size for TPUs"),
        (
            ["--topology", "v5e:2x2", "--decode", "--compare_remat"],
            "--compare_remat is for the train",
        ),
        (["--topology", "v5e:2x2", "--schemes", "plt"], "--schemes is an option of GPUs"),
        (["--topology", "h100:0"], "CARD or CARD:COUNT"),
        (["--topology", "h100", "--slices", "2"], "--slices is an option of TPUs"),
        (["--topology", "h100", "--decode", "--batch", "1,x"], "whole numbers, such as 1,16"),
        (["--topology", "h100", "--decode", "--context", "0"], "--context is 0"),
        (["--topology", "h100", "--schemes", "clp,none"], "no scheme none"),
        (["--topology", "h100", "--loops", "0"], "--loops is 0"),
        (["--topology", "v5e:2x2", "--model.width", "7"], "width 7"),
        (["--topolgy", "v5e:2x2"], "--topology"),
        ([], "--topology"),
    ],
)
def test_bad_input_is_refused(words, says):
    with pytest.raises(InputError, match=says):
        main([TINY, *words])


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"libtpu, which is not installed; pip install '\.\[tpu\]'"
    ):
        main([TINY, "--topology", "v5e:2x2"])


def test_as_a_command_it_prints_one_line_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "plt_jax.compile", TINY, "--topology", "v5e:3x3"],
        **{"cwd": REPOSITORY, "env": environment(), "capture_output": True, "timeout": 100},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: --topology v5e:3x3")


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 25.50G of 15.75G hbm. Exceeded hbm capacity by 9.75G.",
            25.5,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: HLO temporaries (454G) exceeds available HBM (95.73G)", 454, 95.73),
        ("RESOURCE_EXHAUSTED: something else", 0, 0),
    ],
)
def test_a_refusal_of_the_compiler_is_read_as_a_measurement(message, needed, available):
    memory = program.refusal(program.Memory({}), message)
    assert memory.refused == message
    assert memory.needed == pytest.approx(needed * 2**30, abs=1)
    assert memory.available == pytest.approx(available * 2**30, abs=1)
