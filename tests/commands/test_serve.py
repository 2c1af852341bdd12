"""What the command builds before it serves, and what it refuses."""

import gc
import weakref

import jax
import pytest

from plt_jax.commands import serve
from plt_jax.errors import InputError
from plt_jax.runs.directory import open_trained
from plt_jax.serving.slots import SlotModel
from tests.serving.served import import_model, options


def test_the_parameters_are_not_kept_beside_the_weights(tmp_path, monkeypatch):
    held, seen = [open_trained(import_model(tmp_path))], []
    query = weakref.ref(held[0].params["layers"]["q"])

    def look(model):
        gc.collect()
        seen.append(query())

    monkeypatch.setattr(SlotModel, "compile", look)
    serve.build(held.pop(), options())
    assert seen == [None]


def test_more_devices_than_there_are_are_refused():
    here = len(jax.local_devices())
    with pytest.raises(InputError, match=f"--mesh.tensor is {here + 1}, but there are {here}"):
        serve.serving_mesh(here + 1)


@pytest.mark.parametrize("name", ["mesh.tensor", "slots", "prefill_tokens"])
def test_options_below_one_are_refused(monkeypatch, name):
    monkeypatch.setattr("sys.argv", ["serve", "run", f"--{name}", "0"])
    with pytest.raises(InputError, match=f"--{name} is 0; it must be at least 1"):
        serve.parse()
