"""Streaming text: the pieces are the whole, and no character is cut."""

import jax
import numpy as np
import pytest
from tokenizers import processors

from plt_jax import InputError, Sampling, generate
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.decoding import text
from plt_jax.decoding.text import TextStream
from tests.models import random_params, small_config

CONFIG = small_config("plt", 2, vocab_size=258, max_length=40)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer():
    """Every token is one byte."""
    return train_tokenizer(["a union of states"], vocab_size=258, min_frequency=2)


def pieces(tokenizer, prompt="state", new=12, sampling=Sampling(), seed=0):
    key, tokens = jax.random.key(seed), tokenizer.encode_prompt(prompt)
    return list(TextStream(CONFIG, random_params(CONFIG), tokenizer, tokens, new, sampling, key))


@pytest.mark.parametrize(
    "continuation", ["", "plain", "naïve € 😀 ünï", "😀", "ends inside 😀"], ids=repr
)
def test_characters_of_several_bytes_come_whole(tokenizer, monkeypatch, continuation):
    tokens = tokenizer.encode(continuation)
    assert len(tokens) == len(continuation.encode())
    cut = continuation.startswith("ends")
    if cut:
        tokens = tokens[:-1]

    def planned(config, params, request):
        assert request.prompts == [[tokenizer.special.bos, *tokenizer.encode("state")]]
        assert request.sampling.stop_tokens == (5, tokenizer.eos)
        yield from (np.array([token]) for token in [*tokens, tokenizer.eos])

    monkeypatch.setattr(text, "TokenStream", planned)
    out = pieces(tokenizer, sampling=Sampling(stop_tokens=(5,)))
    assert "".join(out) == tokenizer.decode(tokens)
    whole = "".join(out[:-1]) if cut else "".join(out)
    assert REPLACEMENT not in whole
    assert whole == (continuation[:-1] if cut else continuation)
    # Piece by piece: each character is there as soon as its bytes are.
    assert sum(map(bool, out)) == len(continuation)


@pytest.mark.slow(reason="compiles several programs")
def test_pieces_are_the_decoded_tokens(tokenizer):
    """The model is random, so that most of its bytes are no characters."""
    sampling = Sampling(temperature=2.0)
    prompt = [tokenizer.special.bos, *tokenizer.encode("state")]
    for seed in range(3):
        tokens = generate(
            CONFIG,
            random_params(CONFIG),
            [prompt],
            12,
            sampling._replace(stop_tokens=(tokenizer.eos,)),
            jax.random.key(seed),
        )
        out = pieces(tokenizer, sampling=sampling, seed=seed)
        assert "".join(out) == tokenizer.decode(tokens[0].tolist())


def test_it_ends_where_the_context_is_full(tokenizer, monkeypatch):
    asked = []

    def planned(config, params, request):
        asked.append(len(request.prompts[0]) + request.max_new_tokens)
        return iter(())

    monkeypatch.setattr(text, "TokenStream", planned)
    assert "".join(pieces(tokenizer, prompt="s" * 30, new=100)) == ""
    assert asked == [CONFIG.max_length]


def test_prompt_beyond_the_context_is_refused(tokenizer):
    for length in (39, 40, 50):
        with pytest.raises(InputError, match=f"prompt 0 has {length + 1} tokens"):
            pieces(tokenizer, prompt="s" * length, new=1)


def test_a_tokenizer_that_begins_texts_by_itself_does_not_begin_them_twice():
    tokenizer = train_tokenizer(["a state of peace"] * 9, 270, 2)
    plain = tokenizer.encode_prompt("state")
    bos = tokenizer.special.bos
    tokenizer.library.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert tokenizer.library.encode("state").ids == plain
    assert tokenizer.encode_prompt("state") == plain
    assert plain.count(bos) == 1
