"""The package against the golden cases: import, forward pass, every loop, and decoding.

For the dense model types without loops it is compared with transformers; tests/golden/transformers/
make.py makes these cases.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import plt_jax
from plt_jax import decode_step, init_cache, prefill, prepare_for_decode
from tests.golden.huggingface import GOLDEN, read_case
from tests.golden.test_reference import CASES, TOLERANCE, largest_difference
from tests.models import forward, forward_with_states
from tests.tiers import slow_but

TRANSFORMERS = Path(__file__).parent / "transformers"
DENSE = sorted(path.parent.name for path in TRANSFORMERS.glob("*/config.json"))
PREFILLED = 10
QUICK = ["pltcoder_l2_hs_norm"]
OTHERS = "compiles another model"


@pytest.fixture(scope="module", params=slow_but(QUICK, CASES, OTHERS))
def case(request):
    """(folder, configuration, parameters, expected arrays) of each golden case."""
    return read(GOLDEN / request.param)


@pytest.fixture(scope="module", params=slow_but(["llama"], DENSE, OTHERS))
def dense(request):
    """(folder, configuration, parameters, expected arrays) of each case of transformers."""
    return read(TRANSFORMERS / request.param)


def read(folder):
    with np.load(folder / "expected.npz") as arrays:
        return folder, *plt_jax.load_huggingface(folder), dict(arrays)


def check_decoding(config, params, expected):
    """Prefills a part of the tokens, decodes the rest one by one, and compares the logits with the
    expected ones."""
    tokens, logits = expected["input_ids"], expected["logits"]
    B, T = tokens.shape
    params = prepare_for_decode(config, params)
    step = jax.jit(functools.partial(decode_step, config))
    actual, cache = jax.jit(functools.partial(prefill, config))(
        params, tokens[:, :PREFILLED], jnp.full(B, PREFILLED), init_cache(config, B, T)
    )
    assert largest_difference(actual, logits[:, PREFILLED - 1]) < TOLERANCE
    for t in range(PREFILLED, T):
        actual, cache = step(params, tokens[:, t], cache)
        assert largest_difference(actual, logits[:, t]) < TOLERANCE


def test_parameters_are_those_of_an_independent_reader(case):
    folder, _, params, _ = case
    _, expected, _ = read_case(folder)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_logits_and_states_of_every_loop(case):
    _, config, params, expected = case
    logits, states = forward_with_states(config)(params, expected["input_ids"])
    assert largest_difference(logits, expected["logits"]) < TOLERANCE
    assert largest_difference(states.output_LBTD, expected["hidden_loops"]) < TOLERANCE
    assert largest_difference(states.hidden_LBTD, expected["hidden_loops_raw"]) < TOLERANCE


def test_unrolled_layers(case):
    _, config, params, expected = case
    unrolled = config.model_copy(update={"layer_unroll": config.layers})
    logits = forward(unrolled)(params, expected["input_ids"])
    assert largest_difference(logits, expected["logits"]) < TOLERANCE


def test_prefill_and_token_by_token(case):
    _, *model = case
    check_decoding(*model)


def test_logits_of_transformers(dense):
    _, config, params, expected = dense
    logits = forward(config)(params, expected["input_ids"])
    assert largest_difference(logits, expected["logits"]) < TOLERANCE


def test_decoding_gives_the_logits_of_transformers(dense):
    _, *model = dense
    check_decoding(*model)
