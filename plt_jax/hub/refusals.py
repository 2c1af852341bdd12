"""What the Hugging Face Hub refuses, in one line that says what to do."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

from plt_jax.errors import InputError
from plt_jax.hub.names import HubName

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextlib.contextmanager
def asking_hub(name: HubName) -> Iterator[None]:
    """A block that asks the Hub for a repository, with bars of progress on a terminal alone.

    Raises:
      InputError: huggingface_hub raised an error; the message says what to do.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except (_http_error(), OSError, ValueError, RuntimeError) as error:
        raise InputError(_explain(name, error)) from error


def _explain(name: HubName, error: Exception) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # which kept from the Hub where the cache lacks the file
    if isinstance(error, GatedRepoError):
        page = f"{HfApi().endpoint}/{name.repository}"
        return f"{name} is gated; accept its terms on {page}, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no file or folder {name}, and the Hub has no model of that name that you "
            f"may see; correct it, or if it is private, {LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name.repository} has no revision {name.revision}; give a branch, tag or commit"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return (
            f"the Hub refuses {name} to you ({error.response.status_code}); {LOG_IN} to a token "
            "that has the right"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"{HfApi().endpoint} does not answer as a Hub does; correct HF_ENDPOINT"
    if is_outage(error):
        return f"{describe_outage(error)}; run the command again later"
    return f"{name}: {error}; run the command again"


def is_outage(error: Exception) -> bool:
    """Whether an error is the network's or the Hub's, and none of what is asked for."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (_http_error(), OfflineModeIsEnabled))


def describe_outage(error: Exception) -> str:
    """What keeps from the Hub, for a message."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is not asked, since HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers with the error {error.response.status_code}"
    return f"the Hub cannot be reached at {HfApi().endpoint}"


def _http_error() -> type[Exception]:
    """What the library under huggingface_hub raises: httpx, or httpx2 in later versions."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError
