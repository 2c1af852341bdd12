"""The text behind a prompt is the whole text less the prompt's, for every kind of tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.decoding.text import decode_incrementally
from tests.tokenizers_of_kinds import KINDS, tokenizer_of

PIECES = st.sampled_from(
    [*"ab \n\té日😀.,", "the ", "quick ", " fox", "\n    ", "\ufffd", "  ", "1234"]
)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.lists(PIECES, max_size=12).map("".join), data=st.data())
def test_text_is_exact_at_every_cut(kind, text, data):
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(tokens)))
    check(tokenizer, tokens[:cut], tokens[cut:])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_tokens_are_exact_at_every_cut(kind, data):
    """Most are no text that the tokenizer would have made: halves of characters, special tokens."""
    tokenizer = tokenizer_of(kind)
    some = st.lists(st.integers(0, tokenizer.largest_id), max_size=10)
    check(tokenizer, data.draw(some), data.draw(some))


def check(tokenizer, given, new):
    begin = [tokenizer.special.bos]
    pieces = list(decode_incrementally(new, tokenizer, [*begin, *given]))
    before, whole = tokenizer.library.decode(given), tokenizer.library.decode([*given, *new])
    continuation = "".join(pieces)
    assert continuation == tokenizer.decode_continuation(given, new)
    assert all(pieces)
    assert whole.endswith(continuation)
    kept = whole.removesuffix(continuation)
    # All of the prompt but a character that it cut, whose bytes are replacement characters.
    assert before.startswith(kept)
    assert not before[len(kept) :].strip("\ufffd") or kept + continuation == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_keeps_the_space_before_it(kind):
    tokenizer = tokenizer_of(kind)
    given, whole = tokenizer.encode("the quick"), tokenizer.encode("the quick brown")
    assert whole[: len(given)] == given
    assert tokenizer.decode_continuation(given, whole[len(given) :]) == " brown"


@pytest.mark.parametrize("kind", ["byte-level", "Llama 2", "Llama 2, new"])
def test_indentation_is_kept(kind):
    tokenizer = tokenizer_of(kind)
    given, whole = tokenizer.encode("def f(x):"), tokenizer.encode("def f(x):\n    return x")
    assert whole[: len(given)] == given
    pieces = decode_incrementally(whole[len(given) :], tokenizer, given)
    assert "".join(pieces) == "\n    return x"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_continues_gets_no_beginning(kind):
    """What a tokenizer does to the beginning of a text, it does not to what continues one."""
    tokenizer = tokenizer_of(kind)
    given, new = tokenizer.encode("the lazy"), tokenizer.continuing.encode("dog")
    assert tokenizer.decode_continuation(given, new) == "dog"
    assert tokenizer.decode([*given, *new]).endswith("the lazydog")
