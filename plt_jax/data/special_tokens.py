"""The special tokens of a tokenizer: the one that begins a text, and those that end one.

A tokenizer.json does not say which they are. For an imported model the files beside it do: those of
transformers, by transformers' own rules. For others the names of the tokens decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from pydantic import NonNegativeInt
from tokenizers import Tokenizer

from plt_jax.errors import InputError
from plt_jax.files.reading import read_json

BOS_NAMES = ("<|bos|>", "<s>", "<|begin_of_text|>", "<|endoftext|>")
EOS_NAMES = ("<|eos|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>")
"""Names of the two special tokens in tokenizers that no other file describes; of several, the first
in this order is used."""

SPECIAL_TOKENS = "special_tokens.json"
"""Our own file beside a tokenizer.json, which takes precedence over those of transformers."""

DESCRIPTIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
"""The files of transformers that describe a tokenizer, in the order in which their words count."""

_CLASSES_THAT_ADD_BOS = ("Llama", "CodeLlama", "Gemma")
"""How the names of transformers' tokenizer classes begin that add a begin token by default."""


class SpecialTokens(NamedTuple):
    """The special tokens that every text of a model has around it."""

    bos: int | None
    """The token that begins a text; None where a text begins with its own first token."""
    eos: tuple[int, ...]
    """The tokens that end a text, at least one. The first is the one that training writes behind a
    document."""

    def to_json(self) -> str:
        """The content of SPECIAL_TOKENS."""
        values = {"bos_token_id": self.bos, "eos_token_id": list(self.eos)}
        return json.dumps(values) + "\n"


class _Token(pydantic.BaseModel):
    content: str


class _Keys(pydantic.BaseModel):
    """The keys that say which tokens are special, from any of the files."""

    model_config = pydantic.ConfigDict(strict=True)

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    add_bos_token: bool | None = None
    tokenizer_class: str | None = None
    bos_token_id: NonNegativeInt | None = None
    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = None

    @pydantic.field_validator("bos_token_id", "eos_token_id", mode="before")
    @classmethod
    def _without_none(cls, value: Any) -> Any:
        """Numbers below zero, and `false`, stand for no token in some files."""
        values = value if isinstance(value, list) else [value]
        kept = [one for one in values if one is not False and not (_is_int(one) and one < 0)]
        return kept if isinstance(value, list) else (kept or [None])[0]

    @property
    def eos_ids(self) -> Sequence[int]:
        ids = self.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def find_special_tokens(tokenizer: Tokenizer, folder: Path | None) -> SpecialTokens:
    """Finds a tokenizer's special tokens.

    Args:
      tokenizer: the tokenizer.
      folder: the folder with the files that describe it; None if there are none.

    Raises:
      InputError: a file is broken or contradicts the tokenizer, or nothing says which token begins
        or ends a text.
    """
    if folder is not None and (folder / SPECIAL_TOKENS).exists():
        keys = _read(folder / SPECIAL_TOKENS)
        return SpecialTokens(keys.bos_token_id, tuple(keys.eos_ids) or _named_eos(tokenizer))
    files = dict(_described(folder)) if folder is not None else {}
    if not files:
        leading = _leading_special_tokens(tokenizer)
        bos = leading[0] if leading else _by_name(tokenizer, BOS_NAMES, "beginning")
        return SpecialTokens(bos, _named_eos(tokenizer))
    return SpecialTokens(_bos_of(tokenizer, files), _eos_of(tokenizer, files))


def _described(folder: Path) -> Iterator[tuple[str, _Keys]]:
    """The files that describe a tokenizer, in the order in which their words count."""
    for name in DESCRIPTIONS:
        if (folder / name).is_file():
            yield name, _read(folder / name)


def _read(path: Path) -> _Keys:
    try:
        return _Keys.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            f"{path}: {problem['loc'][0]} is {problem['input']!r}, which is none"
        ) from error


def _bos_of(tokenizer: Tokenizer, files: Mapping[str, _Keys]) -> int | None:
    """The begin token by transformers' rules: which it is, and whether a text gets it at all."""
    tokens = files.get("tokenizer_config.json", _Keys())
    leading = _leading_special_tokens(tokenizer)
    adds = tokens.add_bos_token
    if adds is None and leading:
        return leading[0]
    if adds is None and tokens.tokenizer_class is not None:
        adds = tokens.tokenizer_class.startswith(_CLASSES_THAT_ADD_BOS)
    if adds is False:
        return None
    for name, keys in files.items():
        if keys.bos_token is not None:
            return _id_of(tokenizer, keys.bos_token, f"{name}: bos_token")
    for keys in files.values():
        if keys.bos_token_id is not None:
            return keys.bos_token_id
    if leading:
        return leading[0]
    if adds:
        raise InputError(
            "tokenizer_config.json says that a text gets a begin token (add_bos_token), but no "
            "file says which; give its bos_token there"
        )
    ids = special_tokens_by_name(tokenizer)
    return next((ids[name] for name in BOS_NAMES if name in ids), None)


def _eos_of(tokenizer: Tokenizer, files: Mapping[str, _Keys]) -> tuple[int, ...]:
    """All end tokens that any file names."""
    found = [
        _id_of(tokenizer, keys.eos_token, f"{name}: eos_token")
        for name, keys in files.items()
        if keys.eos_token is not None
    ]
    found += [token for keys in files.values() for token in keys.eos_ids]
    return tuple(dict.fromkeys(found)) or _named_eos(tokenizer)


def _named_eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    return (_by_name(tokenizer, EOS_NAMES, "end"),)


def _by_name(tokenizer: Tokenizer, names: Sequence[str], role: str) -> int:
    ids = special_tokens_by_name(tokenizer)
    for name in names:
        if name in ids:
            return ids[name]
    raise InputError(
        f"the tokenizer has no special token for the {role} of a document; add one of "
        f"{', '.join(names)} to it, or a tokenizer_config.json beside it that names another"
    )


def special_tokens_by_name(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of all tokens that the tokenizer calls special."""
    # Only added tokens count: in the vocabulary, "<s>" may be a merge of ordinary text.
    return {
        added.content: index
        for index, added in tokenizer.get_added_tokens_decoder().items()
        if added.special
    }


def _id_of(tokenizer: Tokenizer, token: str | _Token, source: str) -> int:
    name = token if isinstance(token, str) else token.content
    try:
        index = tokenizer.token_to_id(name)
    except UnicodeEncodeError:  # half of a surrogate pair, which is no text
        index = None
    if index is None:
        raise InputError(f"{source} is {name!r}, which the tokenizer does not have")
    return index


def _leading_special_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer itself puts before a text (its post-processor).

    Raises:
      InputError: they are several, which the model's texts cannot have.
    """
    encoding = tokenizer.encode("a")
    marked = encoding.special_tokens_mask
    leading = encoding.ids[: marked.index(0)] if 0 in marked else []
    if len(leading) > 1:
        names = ", ".join(map(str, map(tokenizer.id_to_token, leading)))
        raise InputError(
            f"the tokenizer puts {len(leading)} tokens before a text ({names}); at most one is "
            "supported"
        )
    return leading
