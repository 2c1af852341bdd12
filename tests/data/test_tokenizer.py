"""The tokenizer: exact bytes, text that stays text, the cache, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from plt_jax.data import tokenizer_training as module
from plt_jax.data.special_tokens import SpecialTokens
from plt_jax.data.token_bytes import token_bytes
from plt_jax.data.tokenizer import TextTokenizer, load_tokenizer
from plt_jax.data.tokenizer_training import tokenizer_for, train_tokenizer
from plt_jax.errors import InputError


@pytest.fixture(scope="module")
def trained(documents) -> TextTokenizer:
    return train_tokenizer(documents, 300, 2)


def with_special(library: Tokenizer) -> TextTokenizer:
    """A tokenizer, whose last two tokens begin and end a text."""
    size = library.get_vocab_size()
    return TextTokenizer(library, SpecialTokens(size - 2, (size - 1,)))


def byte_level(*special: str) -> Tokenizer:
    """An untrained byte-level tokenizer with all bytes and the given special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def saved(tokenizer: Tokenizer, folder) -> str:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_training_merges_and_is_repeatable(trained, documents):
    assert trained.library.get_vocab_size() == 300
    assert trained.special == (0, (1,))
    assert len(trained.encode(documents[0])) < len(documents[0]) / 2
    assert train_tokenizer(documents, 300, 2).identity == trained.identity


def test_min_frequency_limits_merges():
    assert train_tokenizer(["ab"] * 5, 300, 6).library.get_vocab_size() == 258
    assert train_tokenizer(["ab"] * 5, 300, 5).library.get_vocab_size() == 259


@pytest.fixture(scope="module")
def trained_bytes(trained) -> np.ndarray:
    return token_bytes(trained, 310)


@given(text=st.text(max_size=60))
def test_bytes_and_text_survive_encoding(trained, trained_bytes, text):
    ids = trained.encode(text)
    assert trained_bytes[ids].sum() == len(text.encode("utf-8"))
    assert trained.decode(ids) == text


def test_special_and_unused_ids_stand_for_no_bytes(trained, trained_bytes):
    assert trained_bytes.dtype == np.int32
    assert trained_bytes.shape == (310,)
    assert list(np.flatnonzero(trained_bytes == 0)) == [0, 1, *range(300, 310)]
    assert trained_bytes[trained.library.token_to_id("Ġthe")] == 4


def test_names_of_special_tokens_in_text_stay_text(trained, tmp_path):
    text = "a <|bos|> b<|eos|>"
    for tokenizer in (trained, load_tokenizer(saved(trained.library, tmp_path))):
        ids = tokenizer.encode(text)
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids) == text


def test_loading_drops_truncation_and_padding(trained, tmp_path):
    other = Tokenizer.from_str(trained.library.to_str())
    other.enable_truncation(2)
    other.enable_padding(length=99)
    assert load_tokenizer(saved(other, tmp_path)).encode("x y z") == trained.encode("x y z")


def test_bytes_of_added_tokens_and_of_nested_decoders():
    tokenizer = byte_level("<s>", "</s>")
    tokenizer.add_tokens([AddedToken("naïve", normalized=False)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    text = "a naïve word"
    ids = tokenizer.encode(text).ids
    assert len(ids) == 8
    assert token_bytes(with_special(tokenizer), 300)[ids].sum() == len(text.encode("utf-8"))


def test_a_normalizer_makes_bytes_those_of_normalized_text():
    tokenizer = byte_level("<s>", "</s>")
    tokenizer.normalizer = normalizers.NFC()
    assert token_bytes(with_special(tokenizer), 300)[tokenizer.encode("e\u0301").ids].sum() == 2


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.Fuse()])]
)
def test_bytes_need_a_byte_level_tokenizer(decoder):
    tokenizer = byte_level("<s>", "</s>")
    tokenizer.decoder = decoder
    with pytest.raises(InputError, match=r"neither byte-level .* which bits per byte need"):
        token_bytes(with_special(tokenizer), 300)


def test_bytes_need_every_byte_in_the_vocabulary():
    tokenizer = byte_level("<s>", "</s>")
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    tokenizer.model = models.BPE({token: i for i, token in enumerate(sorted(vocabulary)[1:])}, [])
    assert not tokenizer.encode("!").ids
    with pytest.raises(InputError, match="neither byte-level with all bytes of ordinary text"):
        token_bytes(with_special(tokenizer), 300)


@pytest.mark.parametrize("text", ["!", "~", " ", "\n", "\t", "é", "中", "한", "😀", "\ufe0f"])
def test_bytes_need_each_byte_of_ordinary_text(text):
    tokenizer = byte_level("<s>", "</s>")
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in level.pre_tokenize_str(text)[0][0]:
        rest = sorted(vocabulary.keys() - {character})
        tokenizer.model = models.BPE({token: i for i, token in enumerate(rest)}, [])
        with pytest.raises(InputError, match="neither byte-level with all bytes of ordinary text"):
            token_bytes(with_special(tokenizer), 300)


def test_bytes_that_text_does_not_have_may_be_missing():
    """As in SmolLM2's vocabulary."""
    tokenizer = byte_level("<s>", "</s>")
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    control = set(level.pre_tokenize_str("\x04\x06\x13\x14\x16\x1d")[0][0])
    # The characters of bytes 0xC0, 0xC1 and 0xF5 to 0xFF are those of the same code points.
    never = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    rest = sorted(vocabulary.keys() - control - never)
    assert len(rest) == 256 - 6 - 13
    tokenizer.model = models.BPE({token: i for i, token in enumerate(rest)}, [])
    text = "naïve 中文 😀\n"
    ids = tokenizer.encode(text).ids
    assert token_bytes(with_special(tokenizer), 300)[ids].sum() == len(text.encode("utf-8"))


def test_bytes_refuse_a_vocabulary_that_does_not_fit(trained):
    with pytest.raises(InputError, match=r"300 tokens, more than model\.vocab_size 299"):
        token_bytes(trained, 299)


@pytest.mark.parametrize(
    ("names", "bos", "eos"),
    [
        (("<s>", "</s>"), "<s>", "</s>"),
        (("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
        (("<|end_of_text|>", "<|begin_of_text|>"), "<|begin_of_text|>", "<|end_of_text|>"),
        (("<|im_end|>", "<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_well_known_special_tokens_are_found(make_config, tmp_path, names, bos, eos):
    path = saved(byte_level(*names), tmp_path)
    tokenizer = tokenizer_for(make_config(tokenizer={"path": path}), [])
    assert tokenizer.special.bos == tokenizer.library.token_to_id(bos)
    assert tokenizer.eos == tokenizer.library.token_to_id(eos)


@pytest.mark.parametrize(("names", "role"), [((), "beginning"), (("<s>",), "end")])
def test_a_tokenizer_without_special_tokens_is_refused(make_config, tmp_path, names, role):
    tokenizer = byte_level(*names)
    tokenizer.add_tokens(["</s>"])  # by its name alone it is no special token
    path = saved(tokenizer, tmp_path)
    with pytest.raises(InputError, match=f"no special token for the {role} of a document"):
        tokenizer_for(make_config(tokenizer={"path": path}), [])


def test_a_tokenizer_larger_than_the_model_is_refused(make_config, tmp_path):
    path = saved(byte_level("<s>", "</s>"), tmp_path)
    config = make_config(tokenizer={"path": path}, model={"vocab_size": 257, "max_length": 16})
    with pytest.raises(
        InputError, match=r"tokenizer\.path: the tokenizer has 258 tokens, more than"
    ):
        tokenizer_for(config, [])


def test_a_vocabulary_below_the_bytes_is_refused(documents):
    with pytest.raises(InputError, match=r"model\.vocab_size 257 cannot hold all 256 bytes"):
        train_tokenizer(documents, 257, 2)
    assert train_tokenizer(documents, 258, 2).library.get_vocab_size() == 258


@pytest.mark.parametrize("content", [None, "", "{}", json.dumps({"version": "9"}), b"\xff\xfe"])
def test_a_missing_or_broken_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"tokenizer\.json .*") as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="Is a directory"):
        load_tokenizer(tmp_path)


def test_trained_tokenizer_is_found_again(make_config, documents, monkeypatch):
    first = tokenizer_for(make_config(), documents)
    trainings = []

    def train(documents, *settings):
        trainings.append(settings)
        return train_tokenizer(documents, *settings)

    monkeypatch.setattr(module, "train_tokenizer", train)
    again = tokenizer_for(make_config(seed=5), documents)
    assert again.identity == first.identity
    assert again.library.encode_special_tokens
    assert trainings == []
    tokenizer_for(make_config(model={"vocab_size": 290, "max_length": 16}), documents)
    tokenizer_for(make_config(tokenizer={"min_frequency": 3}), documents)
    tokenizer_for(make_config(), documents[:-1])
    assert trainings == [(290, 2), (300, 3), (300, 2)]


def test_a_tokenizer_that_fails_on_a_text_is_refused(tmp_path):
    """As one whose vocabulary lacks the token that it gives for what it does not know."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path = saved(tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"fails on a text: .*UNK"):
        load_tokenizer(path)
    loaded = TextTokenizer(tokenizer, SpecialTokens(0, (1,)))
    with pytest.raises(InputError, match=r"fails on a text: .*UNK"):
        loaded.encode("word")
    with pytest.raises(InputError, match="are not UTF-8"):
        loaded.encode("caf\udce9")
