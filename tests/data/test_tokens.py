"""Documents as arrays of tokens, and their cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.data import tokens as module
from plt_jax.data.tokenizer import train_tokenizer
from plt_jax.data.tokens import tokenize
from plt_jax.errors import InputError


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


@given(text=st.text("ab.1 \n\r\t", min_size=1, max_size=80), length=st.integers(0, 9))
def test_chunks_of_a_long_document_make_the_same_tokens(text, length):
    trained = train_tokenizer(["a\n\nb  a.\n\n b\r\n1\n\n"] * 3, 300, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_LENGTH", length)
        tokens = module._encode(["x", text, "y"], trained).tokens
    whole = [trained.encode(part).ids for part in ("x", text, "y")]
    assert tokens.tolist() == [token for ids in whole for token in (0, *ids, 1)]


def test_a_long_document_is_encoded_in_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LENGTH", 4)
    assert module._split("one\ntwo\nthree four\n\nfive\nsix") == [
        "one\ntwo\n",
        "three four\n\nfive\n",
        "six",
    ]


def test_large_vocabularies_take_four_bytes(trained, tmp_path):
    trained = type(trained).from_str(trained.to_str())
    trained.add_tokens([f"<{number}>" for number in range(2**16)])
    trained.encode_special_tokens = True
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
