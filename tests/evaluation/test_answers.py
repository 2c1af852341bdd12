"""What a task asks of a generation, and where its answers end: at end tokens, and at texts that may
be special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.errors import InputError
from plt_jax.evaluation.answers import Answer, read_settings
from tests.tokenizers_of_kinds import KINDS, SPECIAL, tokenizer_of


def answer_of(tokenizer, prompt, tokens, until):
    answer = Answer(tokenizer, prompt, until)
    for token in tokens:
        answer.push(token)
    return answer


def reference(tokenizer, prompt, tokens, until):
    """The same in one go: names of special tokens are in the text, and then taken out of it."""
    if tokenizer.eos in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos)]
    parts, begin = [], 0
    for index, token in enumerate([*tokens, None]):
        if token is None or token in tokenizer.special_ids:
            before = tokenizer.decode_continuation(prompt, tokens[:begin])
            text = tokenizer.decode_continuation(prompt, tokens[:index])
            parts.append((text[len(before) :], False))
            parts.append((tokenizer.name_of(token) if token is not None else "", True))
            begin = index
    named = "".join(part for part, _ in parts)
    cut = min([at for stop in until if (at := named.find(stop)) >= 0], default=len(named))
    shown, at = "", 0
    for part, is_name in parts:
        kept = part[: max(cut - at, 0)]
        shown += "" if is_name else kept
        at += len(part)
    return shown


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_an_answer_ends_at_its_first_stop(kind, data):
    tokenizer = tokenizer_of(kind)
    words = [tokenizer.continuing.encode(text) for text in ("the", " fox", "\n", "\n\n", "x:", "é")]
    words += [[tokenizer.library.token_to_id(name)] for name in SPECIAL]
    pieces = data.draw(st.lists(st.sampled_from(words), max_size=8))
    stops = ["<|im_end|>", "\n\n", "fox", "<|im_end|>\n", "<s>the", "zz", "e f"]
    until = data.draw(st.lists(st.sampled_from(stops), max_size=3))
    prompt = [tokenizer.special.bos, *tokenizer.encode("the quick")]
    tokens = [token for piece in pieces for token in piece]
    answer = answer_of(tokenizer, prompt, tokens, until)
    assert answer.close() == reference(tokenizer, prompt, tokens, until)


@pytest.mark.parametrize("kind", ["byte-level", "Llama 2", "Unigram"])
def test_a_special_token_ends_an_answer_and_is_none_of_it(kind):
    tokenizer = tokenizer_of(kind)
    end = tokenizer.library.token_to_id("<|im_end|>")
    tokens = [*tokenizer.continuing.encode(" fox"), end, *tokenizer.continuing.encode(" jumps")]
    prompt = tokenizer.encode_prompt("the quick")
    answer = answer_of(tokenizer, prompt, tokens, ["<|im_end|>"])
    assert (answer.close(), answer.has_ended) == (" fox", True)
    assert answer_of(tokenizer, prompt, tokens, ["<|im_end|>", "o"]).close() == " f"
    going_on = answer_of(tokenizer, prompt, tokens, ["zz"])
    assert (going_on.close(), going_on.has_ended) == (" fox jumps", False)


@pytest.mark.parametrize(
    ("given", "until", "temperature", "most"),
    [
        ({}, [], 0.0, 256),
        ({"until": "\n", "max_gen_toks": 7}, ["\n"], 0.0, 7),
        ({"until": ["a"], "temperature": 0.7, "top_p": 0.9, "top_k": 5}, ["a"], 0.7, 256),
        ({"do_sample": False, "temperature": 0.7}, [], 0.0, 256),
        ({"do_sample": True, "until": ["", "b"], "max_tokens": 9}, ["b"], 1.0, 9),
        ({"do_sample": True, "temperature": 0.0}, [], 0.0, 256),
    ],
)
def test_settings_of_generations(given, until, temperature, most):
    stops, sampling, count = read_settings(given, [9, 4])
    assert (stops, sampling.temperature, count) == (until, temperature, most)
    assert sampling.stop_tokens == (9, 4)


def test_a_setting_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="generation setting num_beams is unknown"):
        read_settings({"num_beams": 4}, [9])
