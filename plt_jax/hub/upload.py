"""A folder that becomes a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.filesize import decimal

from plt_jax.errors import InputError
from plt_jax.hub.download import Report
from plt_jax.hub.names import HubName
from plt_jax.hub.refusals import LOG_IN, asking_hub

MODEL_CARD = "README.md"
"""The file that the Hub shows on a repository's page."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
"""Name patterns of the files of weights. Those that a repository has left of an earlier push would
be read in the place of the new ones."""


class PushTarget(NamedTuple):
    """A repository that may be written to."""

    name: HubName
    exists: bool
    has_card: bool
    """Whether the branch, or the main one that a new branch begins at, has a MODEL_CARD, which is
    not to be replaced."""


def check_push(name: HubName) -> PushTarget:
    """Checks that a folder can be pushed to a repository, as far as that is known beforehand.

    Raises:
      InputError: nobody is logged in, the token may not write, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    with asking_hub(name):
        try:
            user = api.whoami()
        except LocalTokenNotFoundError as error:
            raise InputError(f"to push to {name}, {LOG_IN}") from error
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise InputError(
                f"your token may only read, so it cannot push to {name}; make one that may write "
                f"on {api.endpoint}/settings/tokens, and {LOG_IN}"
            )
        owner = name.repository.split("/")[0]
        known = [user["name"], *(group["name"] for group in user.get("orgs", ()))]
        exists = api.repo_exists(name.repository)
        # The tokens of other roles may not see the organizations that they may write to.
        if not exists and role == "write" and owner not in known:
            raise InputError(
                f"{user['name']} cannot make {name.repository}; give one of {', '.join(known)} in "
                f"the place of {owner}"
            )
        has_card = exists and any(
            api.file_exists(name.repository, MODEL_CARD, revision=branch)
            for branch in {name.revision, None}
        )
    return PushTarget(name, exists, has_card)


def push(folder: Path, target: PushTarget, message: str, *, report: Report) -> None:
    """Uploads a folder's files as a commit on a branch of a repository, which is made if need be.

    A repository that is made is private. Of an existing one the files of WEIGHTS are replaced as a
    whole, and others stay.

    Raises:
      InputError: the Hub refuses them, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api, (repository, branch) = HfApi(), target.name
    size = decimal(sum(file.stat().st_size for file in folder.iterdir()))
    try:
        with asking_hub(target.name):
            if not target.exists:
                api.create_repo(repository, private=True, exist_ok=True)
                report(f"made the private repository {repository}; its settings can publish it")
            if branch is not None:
                api.create_branch(repository, branch=branch, exist_ok=True)
            report(f"pushing {folder} to {target.name}, {size}")
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=branch,
                commit_message=message,
                delete_patterns=list(WEIGHTS),
            )
    except InputError as error:
        revision = "" if branch is None else f" --revision {branch}"
        raise InputError(
            f"{error}; {folder} is written, and can be pushed with hf upload {repository} {folder} "
            f".{revision}"
        ) from error
    report(f"pushed to {api.endpoint}/{repository}{'' if branch is None else f'/tree/{branch}'}")
