"""The options --mesh.* and --processes.* of commands that open a trained model."""

import jax
import pytest

from plt_jax.commands.device_options import DeviceOptions, add_dtype
from plt_jax.commands.parser import CommandParser
from plt_jax.errors import InputError
from plt_jax.runs.directory import open_trained
from tests.training.runs import assert_refused, command


@pytest.fixture
def connect(monkeypatch):
    """Connects as a command does that was given some words."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])

    def connected(*words: str):
        parser = CommandParser()
        add_dtype(parser, "parameters", "as they are stored")
        devices = DeviceOptions(parser)
        return devices.connect(parser.parse_args(words)), devices

    return connected


def test_without_options_the_command_chooses_the_devices(connect):
    mesh, devices = connect()
    assert mesh is None and devices.timeout == 300
    devices.finish("nothing is left to do")


@pytest.mark.parametrize(
    "words", [["--mesh.fsdp=-1", "--mesh.data=1"], ["--mesh", '{"tensor": 1}']]
)
def test_a_mesh_is_arranged_and_said(connect, words, capsys):
    mesh, _ = connect(*words, "--processes.timeout", "7")
    assert mesh.size == 1 and tuple(mesh.shape) == ("data", "fsdp", "expert", "context", "tensor")
    said = "devices: 1 cpu (data 1 x fsdp 1 x expert 1 x context 1 x tensor 1)\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh.tensor", "2"], "1 devices do not divide by mesh.tensor 2"),
        (["--mesh.data", "2"], "need 2 devices, but there are 1"),
        (["--mesh.data", "many"], "mesh.data = 'many': input should be a valid integer"),
        (["--mesh.data", "0"], "mesh: data is 0"),
        (["--mesh", "data"], "--mesh data is not valid JSON"),
        (["--mesh.rows", "2"], "unknown option --mesh.rows"),
        (["--processes.count", "2"], "processes: coordinator is missing"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    ],
)
def test_what_does_not_fit_is_refused(connect, words, message):
    with pytest.raises(InputError) as refusal:
        connect(*words)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", ["eval.py", "plt_jax.generate"])
def test_commands_explain_and_refuse_them(finished, name):
    shown = " ".join(command(name, "--help").out.split())
    assert "Size of the axis that shards the batch and the parameters" in shown
    assert "HOST:PORT of process 0" in shown
    assert_refused(command(name, finished.directory, "--mesh.data", 3), "need 3 devices")


def test_parameters_are_read_in_another_dtype(finished):
    for dtype in ("float32", "bfloat16"):
        trained = open_trained(finished.directory, dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(trained.params)} == {dtype}
        assert trained.config.model.dtype == finished.config.model.dtype
