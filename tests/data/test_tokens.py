"""Documents as arrays of tokens, and their cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from plt_jax.data import tokens as module
from plt_jax.data.special_tokens import SpecialTokens
from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.data.tokens import encode_documents, tokenize
from plt_jax.errors import InputError
from tests.tokenizers_of_kinds import KINDS, tokenizer_of


@pytest.fixture(scope="module")
def trained(documents):
    return train_tokenizer(documents, 300, 2)


def test_each_document_stands_between_bos_and_eos(documents, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHARACTERS_AT_ONCE", 500)
    texts = [*documents, "says <|eos|>"]
    tokenized = tokenize(texts, trained, str(tmp_path))
    assert tokenized.tokens.dtype == np.uint16
    assert tokenized.starts.dtype == np.int64
    pieces = np.split(tokenized.tokens, tokenized.starts[1:])
    for text, piece in zip(texts, pieces, strict=True):
        assert piece[0] == 0
        assert piece[-1] == 1
        assert 1 not in piece[:-1]
        assert trained.decode(piece[1:-1]) == text


LINES = st.sampled_from(
    ["a", "bc d", "/usr", "end.", "x,", "", "  in", "12", "12345", "é", "日", "\t", "\r", ";\n/a"]
)


@pytest.mark.parametrize("kind", KINDS)
@given(
    text=st.lists(LINES, min_size=1, max_size=20).map("\n".join),
    length=st.integers(1, 9),
    margin=st.integers(8, 24),
)
def test_chunks_of_a_long_document_make_the_same_tokens(kind, text, length, margin):
    tokenizer = tokenizer_of(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_LENGTH", length)
        patch.setattr(module, "_MARGIN", margin)
        tokens = module._encode(["x", text, text, "y"], tokenizer).tokens
    whole = [tokenizer.encode(part) for part in ("x", text, text, "y")]
    begin, end = tokenizer.special.bos, tokenizer.eos
    assert tokens.tolist() == [token for ids in whole for token in (begin, *ids, end)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_is_encoded_in_chunks(kind, monkeypatch):
    """All of these tokenizers end a token at newlines between words."""
    monkeypatch.setattr(module, "_CHUNK_LENGTH", 4)
    monkeypatch.setattr(module, "_MARGIN", 8)
    text = "the fox\nthe dog\nthe union\n\nfor i\nprint"
    chunks = module._chunks([text], tokenizer_of(kind))
    pieces = list(module._encode_chunks(chunks, tokenizer_of(kind), np.dtype("<u2")))
    assert len(pieces) == 4
    assert [last for _, last in pieces] == [False, False, False, True]


def test_a_document_without_begin_token_begins_with_its_text():
    tokenizer = tokenizer_of("byte-level")
    without = TextTokenizer(tokenizer.library, SpecialTokens(None, tokenizer.special.eos))
    (tokens,) = encode_documents(["the fox"], without)
    assert tokens.tolist() == [*tokenizer.encode("the fox"), tokenizer.eos]


def test_large_vocabularies_take_four_bytes(trained, tmp_path):
    library = Tokenizer.from_str(trained.library.to_str())
    library.add_tokens([f"<{number}>" for number in range(2**16)])
    library.encode_special_tokens = True
    trained = TextTokenizer(library, trained.special)
    tokens = tokenize([f"<{2**16 - 1}>"], trained, str(tmp_path)).tokens
    assert tokens.dtype == np.uint32
    assert list(tokens) == [0, 2**16 + 299, 1]


def test_tokens_are_found_again(documents, trained, tmp_path, monkeypatch):
    first = tokenize(documents, trained, str(tmp_path))
    encode, calls = module._encode, []
    monkeypatch.setattr(module, "_encode", lambda *args: calls.append(1) or encode(*args))
    again = tokenize(documents, trained, str(tmp_path))
    assert not calls
    assert isinstance(again.tokens, np.memmap)
    np.testing.assert_array_equal(again.tokens, first.tokens)
    np.testing.assert_array_equal(again.starts, first.starts)
    tokenize(documents[:-1], trained, str(tmp_path))
    tokenize(documents, train_tokenizer(documents, 290, 2), str(tmp_path))
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["tokens", "starts"])
@pytest.mark.parametrize("content", [b"", b"not an array"])
def test_a_broken_cache_is_refused_by_name(documents, trained, tmp_path, kind, content):
    tokenize(documents, trained, str(tmp_path))
    (path,) = tmp_path.glob(f"{kind}-*.npy")
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} is broken; delete it"):
        tokenize(documents, trained, str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_with_added_tokens_make_the_same_tokens(kind, monkeypatch):
    """SentencePiece's tokenizers put a space behind each of them, too."""
    library = Tokenizer.from_str(tokenizer_of(kind).library.to_str())
    library.add_tokens(["<tool>"])
    library.encode_special_tokens = True
    tokenizer = TextTokenizer(library, tokenizer_of(kind).special)
    monkeypatch.setattr(module, "_CHUNK_LENGTH", 4)
    text = "the fox\nthe dog\nthe union<tool>print the fox\nfor<tool> i\nprint\nthe dog"
    (tokens,) = encode_documents([text], tokenizer)
    assert tokens.tolist() == [tokenizer.special.bos, *tokenizer.encode(text), tokenizer.eos]
    given, more = tokenizer.encode("the fox"), "es<tool>print the dog"
    continued = tokenizer.encode_continuation(more)
    text = tokenizer.decode_continuation(given, continued)
    assert text.replace("<tool> ", "<tool>") == more
    behind = library.encode("x<tool>print the dog", add_special_tokens=False).ids
    assert continued[-4:] == behind[-4:]
