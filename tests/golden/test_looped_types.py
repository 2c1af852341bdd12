"""Public looped models against other implementations: Nanbeige against mlx-lm, and Ouro against the
code that is published with its weights. `ouro/make.py` makes the cases of Ouro."""

from pathlib import Path

import jax
import numpy as np
import pytest

import plt_jax
from plt_jax import Transformer, generate
from tests import reference
from tests.golden.huggingface import read_case
from tests.golden.test_model import check_decoding, read
from tests.golden.test_reference import TOLERANCE, largest_difference
from tests.models import forward
from tests.tiers import slow_but

HERE = Path(__file__).parent
NANBEIGE = sorted(path.parent for path in HERE.glob("nanbeige/*/config.json"))
OURO = sorted(path.parent for path in HERE.glob("ouro/*/config.json"))
OTHERS = "compiles another model"


def named(folders):
    return slow_but([folders[0].name], [folder.name for folder in folders], OTHERS)


@pytest.fixture(params=named(NANBEIGE))
def nanbeige(request):
    return read(HERE / "nanbeige" / request.param)


@pytest.fixture(params=named(OURO))
def ouro(request):
    return read(HERE / "ouro" / request.param)


def test_every_case_is_there():
    assert (len(NANBEIGE), len(OURO)) == (3, 3)


def test_nanbeige_has_the_logits_of_mlx(nanbeige):
    _, config, params, expected = nanbeige
    assert config.loop.scheme == "vanilla_loop" and config.loop.count > 1
    logits = forward(config)(params, expected["input_ids"])
    assert largest_difference(logits, expected["logits"]) < TOLERANCE


def test_nanbeige_writes_the_tokens_of_mlx(nanbeige):
    _, config, params, expected = nanbeige
    sampling = plt_jax.Sampling(temperature=0.0)
    (tokens,) = generate(config, params, expected["input_ids"][:1], 12, sampling, jax.random.key(0))
    np.testing.assert_array_equal(tokens, expected["greedy"])


def test_nanbeige_decodes(nanbeige):
    _, *model = nanbeige
    check_decoding(*model)


def test_ouro_has_the_published_logits_after_every_loop(ouro):
    _, config, params, expected = ouro
    assert config.loop.exit_gate
    logits = jax.jit(
        lambda params: Transformer(config).apply(
            {"params": params}, expected["input_ids"], method="logits_by_loop"
        )
    )(params)
    assert largest_difference(logits, expected["logits"]) < TOLERANCE


def test_ouro_decodes(ouro):
    _, config, params, expected = ouro
    check_decoding(config, params, expected | {"logits": expected["logits"][-1]})


def test_ouro_exits_with_the_published_probabilities(ouro):
    _, config, params, expected = ouro

    def exits(model):
        return model.exit_probabilities(model.loop_states(expected["input_ids"]).hidden_LBTD)

    probabilities = Transformer(config).apply({"params": params}, method=exits)
    assert largest_difference(probabilities, expected["exit"]) < 1e-5


@pytest.mark.parametrize("folder", [*NANBEIGE, *OURO], ids=lambda folder: folder.name)
def test_the_reference_has_the_same_logits(folder):
    settings, params, expected = read_case(folder)
    result = reference.forward(settings, params, expected["input_ids"])
    logits = expected["logits"][-1] if "exit" in expected else expected["logits"]
    assert largest_difference(result["logits"], logits) < TOLERANCE


@pytest.mark.parametrize("folder", [*NANBEIGE, *OURO], ids=lambda folder: folder.name)
def test_parameters_are_those_of_an_independent_reader(folder):
    _, params = plt_jax.load_huggingface(folder)
    _, expected, _ = read_case(folder)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
