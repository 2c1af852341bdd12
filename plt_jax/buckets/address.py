"""Which paths lead into buckets.

A bucket has objects whose names hold slashes, and nothing else: no folders, no renaming, no
appending, no locks. An object is written as a whole, or not at all.
"""

from __future__ import annotations

import os

from plt_jax.errors import InputError

SCHEME = "gs://"


def is_in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads into a bucket."""
    return os.fspath(path).startswith(SCHEME)


def refuse_other_schemes(path: str) -> None:
    """Raises InputError for a path such as s3://NAME, which is neither on a disk nor in a bucket of
    Google's."""
    scheme, found, _ = path.partition("://")
    if found and not path.startswith(SCHEME):
        raise InputError(
            f"{path}: {scheme}:// is not supported; give a path of a file system (mount what it "
            f"names), or {SCHEME}BUCKET/PATH"
        )
