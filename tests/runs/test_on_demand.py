"""Runs opened for decoding: their parameters are read while they are laid out, and let go."""

import shutil
import weakref

import jax
import pytest

from plt_jax import InputError, prepare_for_decode
from plt_jax.checkpoint.params import OnDemand, ParamsReader
from plt_jax.config import LoopConfig, MoEConfig
from plt_jax.runs.directory import open_for_decoding, open_trained
from tests.interop.damage import assert_same_params, make_run, write_tokenizer
from tests.models import small_config

SETTINGS = {"vocab_size": 270, "max_length": 32}
MIXTURE = MoEConfig(experts=4, dense_layers=1, experts_per_token=2, expert_width=8, shared_width=8)
CASES = {
    "plt": {},
    "vanilla": {"scheme": "vanilla_loop", "tied_embeddings": True},
    "mixture": {"moe": MIXTURE},
    "biases": {"qkv_bias": True, "qk_norm": False},
    "norms over all heads": {"scheme": "no_loop", "qk_norm_over": "all_heads"},
    "middle": {
        "loop": LoopConfig(scheme="plt", count=2, window=5, first_layer=1, last_layer=1),
        "layers": 3,
    },
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_demand")
    settings = dict(CASES[request.param])
    scheme = settings.pop("scheme", "plt")
    config = small_config(scheme, 1 if scheme == "no_loop" else 2, **SETTINGS)
    config = type(config).model_validate(config.model_dump() | settings)
    return make_run(folder / "run", config, write_tokenizer(folder / "tokenizer.json"))


def laid_out(trained, weights=None):
    return prepare_for_decode(trained.config.model, trained.params, weights)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("options", [{}, {"loops": 3}, {"dtype": "bfloat16"}], ids=str)
def test_the_weights_are_those_of_all_parameters_at_once(run, options, weights):
    if "loops" in options and open_trained(run).config.model.loop.scheme == "no_loop":
        options = {}
    found = open_for_decoding(run, **options)
    assert_same_params(laid_out(found, weights), laid_out(open_trained(run, **options), weights))


def test_each_parameter_is_read_once_and_the_parameters_of_one_product_at_a_time(run, monkeypatch):
    read, names, held, left = ParamsReader.read, [], [], {}

    def recorded(reader, wanted):
        alive = [name for name, array in held if array() is not None]
        found = jax.tree.leaves_with_path(tree := read(reader, wanted))
        own = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]
        names.extend(own)
        left[tuple(own)] = alive
        held.extend(
            (name, weakref.ref(array))
            for name, (path, array) in zip(own, found, strict=True)
            if len(path) > 1  # a parameter of layers
        )
        return tree

    with monkeypatch.context() as patch:
        patch.setattr(ParamsReader, "read", recorded)
        found = open_for_decoding(run)
        assert not names
        assert jax.tree.leaves(laid_out(found))
    whole = jax.tree.leaves_with_path(open_trained(run).params)
    keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in whole]
    assert sorted(names) == sorted(keys)
    assert ("layers.k", "layers.q", "layers.v") in left
    assert not any(left.values()), left


def test_a_parameter_that_is_gone_is_found_out_where_it_is_read(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    run = make_run(tmp_path / "run", small_config(**SETTINGS), tokenizer)
    found = open_for_decoding(run)
    shutil.rmtree(run / "checkpoints/0/params")
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*checkpoints/0") as refusal:
        laid_out(found)
    assert "\n" not in str(refusal.value)


def test_a_tree_on_demand_is_a_mapping():
    asked = []

    def read(wanted):
        asked.append(wanted)
        return jax.tree.map(lambda number: 10 * number, wanted)

    tree = OnDemand({"a": 1, "b": {"c": 2, "d": 3}}, read)
    assert "a" in tree and "e" not in tree and list(tree) == ["a", "b"] and len(tree["b"]) == 2
    assert not asked
    assert tree["b"]["d"] == 30
    assert asked == [{"b": {"d": 3}}]
    changed = tree | {"b": tree["b"] | {"d": 5}}
    assert changed["b"]["d"] == 5 and changed["b"]["c"] == 20 and changed["a"] == 10
    assert len(asked) == 3
    assert changed["b"].together(["c", "d"]) == {"c": 20, "d": 5}
    assert tree["b"].together(["d", "c"]) == {"c": 20, "d": 30}
    assert asked[3:] == [{"b": {"c": 2}}, {"b": {"c": 2, "d": 3}}]
    with pytest.raises(KeyError):
        tree["e"]
