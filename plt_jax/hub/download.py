"""Files of a repository on the Hugging Face Hub, by its name.

They are kept in the Hub's own cache, which other programs share. Only files that are asked for by
their names are fetched, and nothing in them is executed.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.filesize import decimal

from plt_jax.errors import InputError
from plt_jax.hub.names import HubName
from plt_jax.hub.refusals import asking_hub, describe_outage, is_outage

Report = Callable[[str], None]
"""Receives lines for people, without their line ends."""


class Snapshot(NamedTuple):
    """A repository at one commit, and the folder that holds what has been fetched of it."""

    name: HubName
    commit: str
    folder: Path
    sizes: Mapping[str, int]
    """The sizes of the files at the repository's top, in bytes, by name; in an outage of those in
    the folder."""
    outage: str | None
    """Why the Hub cannot be reached; None where it can."""

    def __str__(self) -> str:
        return f"{self.name.repository} at commit {self.commit[:12]}"


def open_snapshot(
    name: HubName, needed: str, others: Collection[str] = (), *, report: Report
) -> Snapshot:
    """Fetches small files of a repository, those that it has.

    Where the Hub cannot be reached, the cache's copy is opened.

    Args:
      needed: the name of a file that it must have.
      others: names of further files.

    Raises:
      InputError: the Hub has no such repository or revision, or does not give it to this user; it
        lacks the file `needed`; or the Hub cannot be reached, and the cache lacks it, too.
    """
    from huggingface_hub import HfApi

    with asking_hub(name):
        try:
            info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
        except Exception as error:
            if not is_outage(error):
                raise
            return _open_cached(name, needed, {needed, *others}, error, report)
    # A name with a slash could lead out of the folder, and no checkpoint needs one.
    sizes = {
        file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename
    }
    if needed not in sizes:
        raise InputError(f"{name} on the Hub has no {needed}; it holds {_some(sizes)}")
    if info.sha is None:
        raise InputError(f"the Hub names no commit of {name}; correct HF_ENDPOINT")
    found = Snapshot(name, info.sha, Path(), sizes, outage=None)
    # By the revision's name, so that the cache remembers which commit that was.
    folder = _download(found, sorted({needed, *others} & sizes.keys()), name.revision, report)
    if folder.name != info.sha:
        raise InputError(f"{name} has changed while it was read; run the command again")
    return found._replace(folder=folder)


def fetch(snapshot: Snapshot, files: Sequence[str], *, report: Report) -> None:
    """Fetches files into a snapshot's folder, unless they are there.

    A file that is there as a whole is not fetched again, and a connection that breaks is taken up
    where it broke.

    Args:
      files: their names.

    Raises:
      InputError: the repository lacks one, or they cannot be fetched.
    """
    missing = [file for file in files if file not in snapshot.sizes]
    if missing and snapshot.outage is not None:
        raise _not_cached(snapshot.name, snapshot.outage)
    if missing:
        raise InputError(
            f"{snapshot.name} on the Hub has no {missing[0]}, which its files name; it holds "
            f"{_some(snapshot.sizes)}"
        )
    if snapshot.outage is None:
        _download(snapshot, files, snapshot.commit, report)


def _download(
    snapshot: Snapshot, files: Sequence[str], revision: str | None, report: Report
) -> Path:
    """Fetches files of a snapshot, and returns their folder in the Hub's cache."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    repository, commit = snapshot.name.repository, snapshot.commit
    with asking_hub(snapshot.name):
        missing = [
            file
            for file in files
            if not isinstance(try_to_load_from_cache(repository, file, revision=commit), str)
        ]
        if missing:
            what = missing[0] if len(missing) == 1 else f"{len(missing)} files"
            size = decimal(sum(snapshot.sizes[file] for file in missing))
            report(f"fetching {what} of {snapshot}, {size}")
        # A name is a pattern here, which could stand for other files.
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _open_cached(
    name: HubName, needed: str, wanted: Collection[str], error: Exception, report: Report
) -> Snapshot:
    """The cache's copy of a repository, because of an error that keeps from the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    outage = describe_outage(error)
    try:
        folder = Path(
            snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=sorted(wanted),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError as missing:
        raise _not_cached(name, outage) from missing
    if not (folder / needed).exists():
        raise _not_cached(name, outage)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    snapshot = Snapshot(name, folder.name, folder, sizes, outage)
    report(f"{outage}; reading the cache's copy of {snapshot}")
    return snapshot


def _not_cached(name: HubName, outage: str) -> InputError:
    revision = "" if name.revision is None else f" --revision {name.revision}"
    return InputError(
        f"there is no file or folder {name}; {outage}, and its cache holds no whole model of that "
        f"name: where the Hub can be reached, run hf download {name.repository}{revision} "
        "--local-dir FOLDER, and give what it has fetched"
    )


def _some(names: Collection[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(sorted(names)[:5]) or "nothing"
