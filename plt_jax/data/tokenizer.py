"""Tokenizers: text to tokens and back, with the special tokens around a text.

The work is done by Hugging Face's `tokenizers`. A TextTokenizer adds what a tokenizer.json does not
say: which tokens begin and end a text, and that most text continues another. Names of special
tokens in a text are ordinary text unless a caller asks for them to be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from plt_jax.data.special_tokens import (
    DESCRIPTIONS,
    SPECIAL_TOKENS,
    SpecialTokens,
    find_special_tokens,
    special_tokens_by_name,
)
from plt_jax.errors import InputError
from plt_jax.files.paths import expand, to_path
from plt_jax.files.reading import read_bounded
from plt_jax.files.writing import write_text
from plt_jax.hub.download import Report, open_snapshot
from plt_jax.hub.names import name_unless_path

TOKENIZER = "tokenizer.json"
_BEFORE = (".", "1", "a")
"""Texts whose tokens hardly join with those of what is behind them."""
MOST_BYTES = 2**28
"""Bytes of the largest tokenizer.json; those of 260,000 tokens have some 30 million."""
HUGGINGFACE = "huggingface"
"""The folder in a run directory that keeps the files of an imported model."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer and its special tokens."""

    library: Tokenizer
    """What encodes and decodes; it adds no special tokens and reads none in a text."""
    special: SpecialTokens

    @property
    def eos(self) -> int:
        """The token that training writes behind a document."""
        return self.special.eos[0]

    @functools.cached_property
    def identity(self) -> str:
        """A text that is equal for tokenizers that give every text the same tokens."""
        text = self.library.to_str()
        return text if self.says_all else text + self.special.to_json()

    @functools.cached_property
    def says_all(self) -> bool:
        """Whether the special tokens are those that the tokenizer by itself tells."""
        try:
            return find_special_tokens(self.library, None) == self.special
        except InputError:
            return False

    @functools.cached_property
    def continuing(self) -> TextTokenizer:
        """The tokenizer of a text that continues another.

        SentencePiece's tokenizers put a space before a text, and some strip one: both belong to its
        beginning alone.
        """
        settings = without_beginning(json.loads(self.library.to_str()))
        library = Tokenizer.from_str(json.dumps(settings))
        library.encode_special_tokens = self.library.encode_special_tokens
        return TextTokenizer(library, self.special)

    @functools.cached_property
    def reading_special(self) -> TextTokenizer:
        """The tokenizer that reads names of special tokens in a text as these tokens, as a rendered
        chat needs."""
        library = Tokenizer.from_str(self.library.to_str())
        library.encode_special_tokens = False
        return TextTokenizer(library, self.special)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin and end it.

        Raises:
          InputError: the tokenizer fails on the text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # of the command line, or half of a surrogate pair
            raise InputError(f"the text {text[:60]!r} holds bytes that are not UTF-8") from error
        with refusing_failures("the tokenizer fails on a text"):
            return self.library.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """The tokens of a text that continues another, which ends at a token's end.

        Raises:
          InputError: the tokenizer fails on the text.
        """
        tokens = self.continuing.encode(text)
        if self.library.get_added_tokens_decoder().keys().isdisjoint(tokens):
            return tokens
        # Behind an added token some tokenizers put a space, as at the beginning of a text.
        for before in _BEFORE:
            given, whole = self.encode(before), self.encode(before + text)
            if whole[: len(given)] == given:
                return whole[len(given) :]
        return tokens

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text at the beginning of a document, the begin token first; at least one.

        A text that brings its own begin token, as a rendered chat may, gets no second one. A model
        without a begin token begins an empty text behind the end of another document.
        """
        tokens, bos = self.encode(text), self.special.bos
        if bos is None:
            return tokens or [self.eos]
        return tokens if tokens[:1] == [bos] else [bos, *tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens from the beginning of a text on; special tokens have none."""
        return self.library.decode(tokens)

    def decode_continuation(self, given: Sequence[int], new: Sequence[int]) -> str:
        """The text of new tokens behind given ones: what all have, less what the given ones have.

        Both have the text that they have together, spaces included. Where the given tokens end
        within a character, that character is new.
        """
        return behind(self.decode(given), self.decode([*given, *new]))

    @functools.cached_property
    def _changes_segments(self) -> bool:
        settings = json.loads(self.library.to_str())
        return without_beginning(settings) != settings

    def can_be_cut(self, text: str) -> bool:
        """Whether parts of a text can be encoded by themselves, see `continuing`.

        A space before a text stands behind each added token in it, too.
        """
        return not self._changes_segments or not any(
            added.content in text
            for added in self.library.get_added_tokens_decoder().values()
            if not added.special
        )

    def name_of(self, token: int) -> str:
        """A token as its vocabulary spells it; nothing for an id without a token."""
        return self.library.id_to_token(token) or ""

    def check_size(self, vocab_size: int) -> None:
        """Raises InputError for ids of `vocab_size` or above."""
        # Ids may have gaps, so the largest id decides, not the number of tokens.
        needed = self.largest_id + 1
        if needed > vocab_size:
            raise InputError(
                f"the tokenizer has {needed} tokens, more than model.vocab_size {vocab_size}; "
                f"set model.vocab_size to {needed} or more"
            )
        for token in (self.special.bos, *self.special.eos):
            if token is not None and token >= vocab_size:
                raise InputError(
                    f"the special token {token} lies outside of the model's vocabulary of "
                    f"{vocab_size}; correct its number in the tokenizer's files"
                )

    @property
    def largest_id(self) -> int:
        return max(self.library.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """All special tokens, which have no text."""
        return frozenset(special_tokens_by_name(self.library).values())

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files into a folder.

        Raises:
          InputError: they cannot be written.
        """
        write_text(folder / TOKENIZER, self.library.to_str())
        write_text(folder / SPECIAL_TOKENS, self.special.to_json())


_print_line = functools.partial(print, flush=True)


def find_tokenizer(given: str, report: Report = _print_line) -> Path:
    """The tokenizer.json that a user means: the path of one, or the name of a repository on the
    Hugging Face Hub, from which it is fetched with the files that describe it.

    Args:
      given: a path, ORG/NAME or ORG/NAME@REVISION.
      report: receives a line for people about what is fetched.

    Raises:
      InputError: it is a name, and the Hub gives no tokenizer by it, see `open_snapshot`.
    """
    name = name_unless_path(given)
    if name is None:
        return to_path(given)
    return open_snapshot(name, TOKENIZER, DESCRIPTIONS, report=report).folder / TOKENIZER


def load_tokenizer(path: str | Path, described_in: Path | None = None) -> TextTokenizer:
    """Reads a tokenizer.json of Hugging Face tokenizers, without its truncation and padding.

    Args:
      path: the file.
      described_in: the folder whose files say which of its tokens are special, if there are any;
        default: the file's own, or for a run directory its huggingface/.

    Raises:
      InputError: the file cannot be read, or is not a tokenizer.json; or its special tokens are
        not known, see `find_special_tokens`.
    """
    path = expand(path)
    try:
        text = read_bounded(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read the tokenizer {path} ({error.strerror}); give the path of a "
            "tokenizer.json file"
        ) from error
    except InputError:
        raise
    except ValueError as error:
        raise _not_a_tokenizer(path, error) from error
    with refusing_failures(f"{path} is not a tokenizer.json that can be used"):
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises no narrower class for what it refuses
            raise _not_a_tokenizer(path, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The file does not keep this setting, which makes a special token's name in a text stay text.
    tokenizer.encode_special_tokens = True
    folder = described_in or _described_in(path)
    with refusing_failures(f"{path} is a tokenizer.json that fails on a text"):
        return TextTokenizer(tokenizer, find_special_tokens(tokenizer, folder))


def _described_in(path: Path) -> Path | None:
    """The folder of the files that describe a tokenizer."""
    if path.name != TOKENIZER:
        return None  # the files beside it are those of another one
    own, kept = path.parent, path.parent / HUGGINGFACE
    return kept if kept.is_dir() and not (own / SPECIAL_TOKENS).exists() else own


def _not_a_tokenizer(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a tokenizer.json of Hugging Face tokenizers "
        f"({' '.join(str(error).split())}); replace it, or delete it to have it made again"
    )


def behind(shown: str, text: str) -> str:
    """The part of a text behind what it has in common with an earlier one, from the beginning."""
    if text.startswith(shown):
        return text[len(shown) :]
    pairs = zip(shown, text, strict=False)
    return text[next((i for i, (old, new) in enumerate(pairs) if old != new), len(text)) :]


@contextlib.contextmanager
def refusing_failures(message: str) -> Iterator[None]:
    """Turns what the library raises into an InputError: a plain Exception, or a panic, which is
    none."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message}: {error}") from error


def without_beginning(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tokenizer without what it does at the beginning of a text."""
    return settings | {
        "normalizer": _continuing_step(settings["normalizer"]),
        "pre_tokenizer": _continuing_step(settings["pre_tokenizer"]),
    }


def _continuing_step(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without what it does at the beginning of a text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        steps = [kept for one in step[name] if (kept := _continuing_step(one)) is not None]
        return step | {name: steps}
    changes = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
        "Strip": {"strip_left": False},
    }
    return step | changes.get(step["type"], {})
