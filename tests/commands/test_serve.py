"""What the command builds before it serves, and what it refuses."""

import gc
import weakref

import jax
import pytest

from plt_jax.checkpoint.params import ParamsReader
from plt_jax.commands import serve
from plt_jax.errors import InputError
from plt_jax.serving.slots import SlotModel
from tests.serving.served import build, import_model


def test_the_parameters_are_not_kept_beside_the_weights(tmp_path, monkeypatch):
    read, held, seen = ParamsReader.read, [], []

    def recorded(reader, wanted):
        found = read(reader, wanted)
        held.extend(weakref.ref(array) for array in jax.tree.leaves(found.get("layers")))
        return found

    def look(model):
        gc.collect()
        seen.append([array() for array in held if array() is not None])

    monkeypatch.setattr(ParamsReader, "read", recorded)
    monkeypatch.setattr(SlotModel, "compile", look)
    build(import_model(tmp_path))
    assert held and seen == [[]]


def test_more_devices_than_there_are_are_refused():
    here = len(jax.local_devices())
    with pytest.raises(InputError, match=f"--mesh.tensor is {here + 1}, but there are {here}"):
        serve.serving_mesh(here + 1)


@pytest.mark.parametrize("name", ["mesh.tensor", "slots", "prefill_tokens"])
def test_options_below_one_are_refused(monkeypatch, name):
    monkeypatch.setattr("sys.argv", ["serve", "run", f"--{name}", "0"])
    with pytest.raises(InputError, match=f"--{name} is 0; it must be at least 1"):
        serve.parse()
