"""Names of model repositories on the Hugging Face Hub, and how one is told from a path."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

from plt_jax.errors import InputError
from plt_jax.files.paths import expand

_FORM = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\w[\w./-]*))?", re.ASCII)


class HubName(NamedTuple):
    """The name of a model repository, ORG/NAME or ORG/NAME@REVISION."""

    repository: str
    revision: str | None
    """A branch, a tag or a commit; None for the main branch."""

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def read_name(text: str) -> HubName | None:
    """The name of a repository that a text is; None if it has not the form of one.

    Raises:
      InputError: it has, but huggingface_hub is not installed.
    """
    match = _FORM.fullmatch(text)
    if match is None or ".." in text:
        return None
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"there is no file or folder {text}; if it is the name of a model on the Hugging Face "
            "Hub, install what fetches it: pip install 'plt_jax[hub]'"
        )
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return HubName(match[1], match[2])


def name_unless_path(text: str) -> HubName | None:
    """The name of a repository that a text is; None if it is a path.

    What exists is a path, whatever its form.

    Raises:
      InputError: see `read_name`.
    """
    return None if os.path.lexists(expand(text)) else read_name(text)
