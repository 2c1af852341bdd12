"""The tokenizer of a run: trained on its documents, or loaded from the file that it names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from plt_jax.config import RunConfig
from plt_jax.data.cache import cache_folder, fingerprint, write_atomically
from plt_jax.data.special_tokens import BOS_NAMES, EOS_NAMES, SpecialTokens
from plt_jax.data.tokenizer import TextTokenizer, find_tokenizer, load_tokenizer
from plt_jax.errors import InputError, naming

SMALLEST_VOCABULARY = 258
"""Tokens of a tokenizer that has one for each of the 256 bytes, and the two special ones."""


def tokenizer_for(config: RunConfig, documents: Sequence[str]) -> TextTokenizer:
    """The tokenizer of a run: the one that `tokenizer.path` names, or one trained on the documents.

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
        with naming("tokenizer.path"):
            tokenizer = load_tokenizer(find_tokenizer(config.tokenizer.path))
            tokenizer.check_size(config.model.vocab_size)
        return tokenizer
    settings = (config.model.vocab_size, config.tokenizer.min_frequency)
    name = f"tokenizer-{fingerprint([repr(settings), *documents])}.json"
    path = cache_folder(config.data.cache_dir) / name
    if path.exists():
        return load_tokenizer(path)
    tokenizer = train_tokenizer(documents, *settings)
    text = tokenizer.library.to_str()
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, min_frequency: int) -> TextTokenizer:
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
    return TextTokenizer(tokenizer, SpecialTokens(bos=0, eos=(1,)))
