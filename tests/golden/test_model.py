"""The package against the golden cases of dense models: forward pass, every loop, and decoding."""

import functools

import jax.numpy as jnp
import pytest

from plt_jax import LoopConfig, ModelConfig, decode_step, init_cache, prefill, prepare_for_decode
from tests.golden.huggingface import read_case
from tests.golden.test_reference import CASES, TOLERANCE, golden, largest_difference  # noqa: F401
from tests.models import compiled, forward_with_states

DENSE = [case for case in CASES if not case.startswith("moe")]
PREFILLED = 10


def model_config(settings, params) -> ModelConfig:
    """The package's configuration of a case."""
    names = ("layers", "heads", "kv_heads", "head_width", "width", "rope_theta", "norm_epsilon")
    options = ("tied_embeddings", "qk_norm", "ffn_output_norm")
    return ModelConfig(
        **{name: getattr(settings, name) for name in (*names, *options)},
        vocab_size=params["embedding"].shape[0],
        ffn_width=params["layers"]["ffn_gate"].shape[-1],
        loop=LoopConfig(**vars(settings.loop)),
    )


@pytest.fixture(scope="module", params=DENSE)
def case(golden, request):  # noqa: F811
    """(configuration, parameters, expected arrays) of each dense case."""
    settings, params, expected = read_case(golden / request.param)
    return model_config(settings, params), params, expected


def test_dense_cases_are_all_here(golden):  # noqa: F811
    dense = [case for case in CASES if not read_case(golden / case)[0].moe.experts]
    assert dense == DENSE


def test_logits_and_states_of_every_loop(case):
    config, params, expected = case
    logits, states = forward_with_states(config)(params, expected["input_ids"])
    assert largest_difference(logits, expected["logits"]) < TOLERANCE
    assert largest_difference(states.handed_LBTD, expected["hidden_loops"]) < TOLERANCE
    assert largest_difference(states.raw_LBTD, expected["hidden_loops_raw"]) < TOLERANCE


def test_prefill_and_token_by_token(case):
    config, params, expected = case
    tokens, logits = expected["input_ids"], expected["logits"]
    B, T = tokens.shape
    params = prepare_for_decode(config, params)
    step = compiled(functools.partial(decode_step.__wrapped__, config))
    actual, cache = compiled(functools.partial(prefill.__wrapped__, config))(
        params, tokens[:, :PREFILLED], jnp.full(B, PREFILLED), init_cache(config, B, T)
    )
    assert largest_difference(actual, logits[:, PREFILLED - 1]) < TOLERANCE
    for t in range(PREFILLED, T):
        actual, cache = step(params, tokens[:, t], cache)
        assert largest_difference(actual, logits[:, t]) < TOLERANCE
