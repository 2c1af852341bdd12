"""Chat templates: messages become the text that a chat model was trained on.

A template comes with a model, from anyone. It runs in Jinja's sandbox, in a process of its own with
limits (template_process.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from plt_jax.data.special_tokens import special_tokens_by_name
from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.decoding.template_process import template_process
from plt_jax.errors import InputError
from plt_jax.files.reading import read_json

DEFAULT = "default"
"""The name of the template that is used if none is named."""

_PRIVATE_USE = 0xF0000
"""The first of 65,534 characters that no language has."""
_TAG = "<the-last-message-ends-here>"
"""Stands behind the content of a message that is to be continued, while it is rendered."""

Message = Mapping[str, Any]
"""A message has a `role` (system, user, assistant) and a `content`."""


class ChatTemplate(NamedTuple):
    """The chat template of a model."""

    source: str
    """The template, in Jinja's language as transformers extends it."""
    variables: Mapping[str, str]
    """The names of the model's special tokens, as `bos_token`."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
          add_generation_prompt: whether the text ends with what begins the assistant's answer; else
            with the content of the last message, which the model continues.

        Raises:
          InputError: the template is broken, refuses the messages (ChatRefusedError), or needs
            more than the limits of template_process.py.
        """
        if not add_generation_prompt:
            *before, last = messages
            messages = [*before, {**last, "content": f"{last['content']}{_TAG} "}]
        given = {
            "messages": list(map(dict, messages)),
            "add_generation_prompt": add_generation_prompt,
        }
        absent = {"tools": None, "documents": None}
        text = template_process().render(self.source, {**given, **absent, **self.variables})
        return text if add_generation_prompt else _cut(text)


def load_chat_template(
    folder: Path, tokenizer: TextTokenizer, name: str | None = None
) -> ChatTemplate:
    """Reads the chat template of an imported model.

    Args:
      folder: the files of transformers, in a run directory its huggingface/.
      tokenizer: the model's, whose special tokens the template may name.
      name: which of several templates; default the one named DEFAULT.

    Raises:
      InputError: there is none, none of that name, or a file is broken.
    """
    found = find_chat_template(folder, tokenizer, name)
    if found is None:
        raise InputError(
            "the model has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), so it is no chat model; give a plain prompt"
        )
    return found


def find_chat_template(
    folder: Path, tokenizer: TextTokenizer, name: str | None = None
) -> ChatTemplate | None:
    """Does what `load_chat_template` does, but returns None for a model that is no chat model."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    templates = _templates(folder, settings)
    if not templates:
        return None
    chosen = name or DEFAULT
    if chosen not in templates:
        raise InputError(
            f"the model has no chat template called {chosen}; it has {', '.join(templates)}"
        )
    variables = {"eos_token": tokenizer.name_of(tokenizer.eos)}
    if tokenizer.special.bos is not None:
        variables["bos_token"] = tokenizer.name_of(tokenizer.special.bos)
    variables |= {
        key: text
        for key, value in settings.items()
        if key.endswith("_token") and (text := _token_text(value)) is not None
    }
    return ChatTemplate(templates[chosen], variables)


def encode_chat(
    template: ChatTemplate, tokenizer: TextTokenizer, messages: Sequence[Message]
) -> list[int]:
    """The tokens of a conversation, up to where the assistant's answer begins.

    Names of special tokens in the template are these tokens. In a message they are text: who writes
    one must not be able to end it, or to begin another.

    Raises:
      InputError: see `ChatTemplate.render`.
    """
    names = special_tokens_by_name(tokenizer.library)
    written = "\0".join(_texts(messages))
    if not any(name in written for name in names):
        return tokenizer.reading_special.encode(template.render(messages))
    return _encode_quoting(template, tokenizer, messages)


def _encode_quoting(
    template: ChatTemplate, tokenizer: TextTokenizer, messages: Sequence[Message]
) -> list[int]:
    """Does what `encode_chat` does, for messages in which names of special tokens may stand.

    A tokenizer whose special tokens have other names reads the template's ones by these names, and
    the messages' ones as text.
    """
    names = special_tokens_by_name(tokenizer.library)
    # A longer name may contain a shorter one, so it is replaced first.
    longest_first = sorted(names, key=len, reverse=True)
    marks = [chr(_PRIVATE_USE + index) for index in range(2 * len(names))]
    quoted = dict(zip(longest_first, marks, strict=False))
    renamed = dict(zip(longest_first, marks[len(names) :], strict=True))
    # No language has these characters, so a message that has some loses nothing.
    absent = str.maketrans(dict.fromkeys(marks, "\N{REPLACEMENT CHARACTER}"))
    messages = _changed(list(messages), lambda text: _replace_all(text.translate(absent), quoted))
    unquoted = {mark: name for name, mark in quoted.items()}
    text = _replace_all(template.render(messages), renamed | unquoted)
    other = _with_names(tokenizer, tuple(renamed.items()))
    ids = {other.library.token_to_id(mark): names[name] for name, mark in renamed.items()}
    return [ids.get(token, token) for token in other.encode(text)]


@functools.lru_cache(8)
def _with_names(tokenizer: TextTokenizer, renamed: tuple[tuple[str, str], ...]) -> TextTokenizer:
    """A tokenizer that reads its special tokens by other names, maybe under other numbers."""
    names, settings = dict(renamed), json.loads(tokenizer.library.to_str())
    for added in settings["added_tokens"]:
        if added["special"]:
            added["content"] = names[added["content"]]
    # Unigram's vocabulary has the names as pieces of ordinary text.
    model, vocabulary = settings["model"], settings["model"]["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    library = Tokenizer.from_str(json.dumps(settings | {"post_processor": None}))
    library.encode_special_tokens = False
    return TextTokenizer(library, tokenizer.special)


def _texts(values: Any) -> Iterator[str]:
    """All strings in a structure of JSON."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        yield from _texts([*values, *values.values()])
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value)


def _changed(values: Any, change: Callable[[str], str]) -> Any:
    """A structure of JSON with all its strings changed."""
    if isinstance(values, str):
        return change(values)
    if isinstance(values, Mapping):
        return {_changed(name, change): _changed(value, change) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_changed(value, change) for value in values]
    return values


def _replace_all(text: str, by: Mapping[str, str]) -> str:
    """A text in which some others are replaced, the first ones first."""
    for old, new in by.items():
        text = text.replace(old, new)
    return text


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """All templates by name, from the places where transformers keeps them."""
    found: dict[str, str] = {}
    declared = settings.get("chat_template")
    if isinstance(declared, str):
        found[DEFAULT] = declared
    elif isinstance(declared, list):
        for entry in declared:
            match entry:
                case {"name": str(name), "template": str(source)}:
                    found[name] = source
                case _:
                    raise InputError(f"{folder}: chat_template holds {entry!r}, which is none")
    elif declared is not None:
        raise InputError(f"{folder}: chat_template is a {type(declared).__name__}, not a text")
    if (folder / "chat_template.json").is_file():
        own = read_json(folder / "chat_template.json").get("chat_template")
        found |= {DEFAULT: own} if isinstance(own, str) else {}
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            found[DEFAULT] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    return found


def _token_text(value: Any) -> str | None:
    """The text of a special token, which is a string or an AddedToken's fields."""
    match value:
        case str(text) | {"content": str(text)}:
            return text
    return None


def _cut(text: str) -> str:
    """The text up to the tag behind the last message's content."""
    before, tag, behind = text.rpartition(_TAG)
    if not tag:
        raise InputError("the chat template leaves out the last message; it cannot be continued")
    # A template that strips the content has taken the space behind the tag away.
    return before if behind.startswith(" ") else before.rstrip()
