"""Byte-level BPE tokenizers: trained, loaded, cached, and their tokens measured in bytes.

Tokenizers are plain `tokenizers.Tokenizer` objects. Those from this module never read a special
token out of a document: its name there is encoded as ordinary characters.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from plt_jax.config import RunConfig
from plt_jax.data.cache import cache_folder, fingerprint, write_atomically
from plt_jax.errors import InputError, naming
from plt_jax.files import expand

BOS_NAMES = ("<|bos|>", "<s>", "<|begin_of_text|>", "<|endoftext|>")
EOS_NAMES = ("<|eos|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>")
"""Names of the two special tokens in tokenizers; of several, the first in this order is used."""

SMALLEST_VOCABULARY = 258
"""Tokens of a tokenizer that has one for each of the 256 bytes, and the two special ones."""


def tokenizer_for(config: RunConfig, documents: Sequence[str]) -> Tokenizer:
    """The tokenizer of a run: the one at `tokenizer.path`, or one trained on the documents.

    A trained tokenizer is kept in `data.cache_dir`, and reused for the same documents and settings.

    Args:
      config: the run; its sections model, data and tokenizer are read.
      documents: the training documents; without the validation documents, which must not have an
        influence on the vocabulary.

    Raises:
      InputError: the tokenizer's file is missing or broken, has more tokens than
        `model.vocab_size`, or lacks a special token; `model.vocab_size` is too small to train a
        tokenizer; or the cache cannot be written.
    """
    if config.tokenizer.path is not None:
        tokenizer = named_tokenizer(config.tokenizer.path)
        with naming("tokenizer.path"):
            check_size(tokenizer, config.model.vocab_size)
        return tokenizer
    settings = (config.model.vocab_size, config.tokenizer.min_frequency)
    name = f"tokenizer-{fingerprint([repr(settings), *documents])}.json"
    path = cache_folder(config.data.cache_dir) / name
    if path.exists():
        return load_tokenizer(path)
    tokenizer = train_tokenizer(documents, *settings)
    write_atomically(path, lambda file: file.write(tokenizer.to_str().encode("utf-8")))
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, with `<|bos|>` as token 0 and `<|eos|>` as token 1.

    Args:
      documents: the text to train on.
      vocab_size: largest number of tokens; a short text gives fewer.
      min_frequency: occurrences that a pair of tokens needs to be merged.

    Raises:
      InputError: vocab_size cannot hold every byte and the two special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"model.vocab_size {vocab_size} cannot hold all 256 bytes and 2 special tokens; "
            f"set it to {SMALLEST_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[BOS_NAMES[0], EOS_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json of Hugging Face tokenizers, without its truncation and padding.

    Raises:
      InputError: the file cannot be read, or is not a tokenizer.json.
    """
    path = expand(path)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the tokenizer {path} ({error.strerror}); give the path of a "
            "tokenizer.json file"
        ) from error
    except Exception as error:  # tokenizers raises no narrower class for a file that it refuses
        raise InputError(
            f"{path} is not a tokenizer.json of Hugging Face tokenizers "
            f"({' '.join(str(error).split())}); replace it, or delete it to have it made again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The file does not keep this setting, which makes a special token's name in a text stay text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def named_tokenizer(path: str) -> Tokenizer:
    """Loads the tokenizer that `tokenizer.path` names.

    Raises:
      InputError: the file is missing or broken, or the tokenizer lacks a special token.
    """
    with naming("tokenizer.path"):
        tokenizer = load_tokenizer(path)
        bos_id(tokenizer)
        eos_id(tokenizer)
    return tokenizer


def bos_id(tokenizer: Tokenizer) -> int:
    """The id of the token that begins a document.

    Raises:
      InputError: the tokenizer has none of BOS_NAMES.
    """
    return _special_id(tokenizer, BOS_NAMES, "beginning")


def eos_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document.

    Raises:
      InputError: the tokenizer has none of EOS_NAMES.
    """
    return _special_id(tokenizer, EOS_NAMES, "end")


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """The number of bytes of UTF-8 text that each token stands for.

    Summed over the tokens of a text, they are its length in bytes, provided that the tokenizer does
    not change the text. A tokenizer with a normalizer (as Unicode NFC) or a prefix space counts the
    changed text, and one that lacks rare bytes (such as control characters) omits those.

    Args:
      tokenizer: a byte-level tokenizer.
      vocab_size: V, at least the tokenizer's size.

    Returns:
      int32 [V], 0 for special tokens and for ids without a token.

    Raises:
      InputError: the tokenizer is not byte-level, lacks a byte of ordinary text, or has ids of V or
        above.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    # A tokenizer that lacks a byte drops it from the text silently.
    if not (_decodes_bytes(tokenizer) and _ordinary_bytes().issubset(vocabulary)):
        raise InputError(
            "the tokenizer is not byte-level with all bytes of ordinary text, which bits per byte "
            "need; give a byte-level one as tokenizer.path, or none to have one trained"
        )
    check_size(tokenizer, vocab_size)
    lengths = np.zeros(vocab_size, np.int32)
    for token, index in vocabulary.items():
        # In a byte-level vocabulary each character of this alphabet is one byte.
        lengths[index] = len(token) if alphabet.issuperset(token) else len(token.encode("utf-8"))
    for index, added in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode("utf-8"))
    return lengths


def _special_id(tokenizer: Tokenizer, names: Sequence[str], role: str) -> int:
    # Only added tokens count: in the vocabulary, "<s>" may be a merge of ordinary text.
    ids = {
        added.content: index
        for index, added in tokenizer.get_added_tokens_decoder().items()
        if added.special
    }
    for name in names:
        if name in ids:
            return ids[name]
    raise InputError(
        f"the tokenizer has no special token for the {role} of a document; "
        f"add one of {', '.join(names)} to it"
    )


def check_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InputError for a tokenizer with ids of `vocab_size` or above."""
    # Ids may have gaps, so the largest id decides, not the number of tokens.
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if needed > vocab_size:
        raise InputError(
            f"the tokenizer has {needed} tokens, more than model.vocab_size {vocab_size}; "
            f"set model.vocab_size to {needed} or more"
        )


@functools.cache
def _ordinary_bytes() -> frozenset[str]:
    """The byte-level alphabet's characters for all bytes in the UTF-8 of printable text, of any
    script.

    Public tokenizers may lack the remaining bytes: those that UTF-8 never has, and control
    characters.
    """
    visible = [9, 10, 13, *range(32, 127)]
    scripts = [*range(0xA0, 0xD800, 7), *range(0xE000, 0x10000, 7), *range(0x1F300, 0x1FB00, 7)]
    text = "".join(map(chr, visible + scripts))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return frozenset(level.pre_tokenize_str(text)[0][0])


def _decodes_bytes(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    return any(step.get("type") == "ByteLevel" for step in steps)
