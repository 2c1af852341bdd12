"""The calls that paths and locks in buckets make, and what goes wrong with them.

This folder is the only one that knows epath, gcsfs and google-cloud-storage. A call that the
service does not answer is repeated; every failure is an OSError whose `strerror` is a clause for
people.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from plt_jax.buckets.address import SCHEME
from plt_jax.errors import FailedError, InputError

PATIENCE = "PLT_BUCKET_PATIENCE"
"""The environment variable for the seconds in which a call that a bucket does not answer is
repeated."""
PATIENCE_SECONDS = 300
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two attempts; each pause is twice as long as the one before it."""
EMULATOR = "STORAGE_EMULATOR_HOST"
"""The environment variable for the address of an emulator of Google's service."""

Result = TypeVar("Result")

# epath would take TensorFlow's file system where TensorFlow happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "false")
if address := os.environ.get(EMULATOR):
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
    # gcsfs would ask Google itself for the kind of the bucket.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def check_bucket(path: Path) -> None:
    """Checks that the objects in the bucket of a path can be listed.

    Raises:
      InputError: there is no such bucket, no right to list it, or no way to Google's service.
    """
    bucket, inside = _split(path)
    try:
        with as_os_errors(path):
            file_system().call("GET", "b/{}/o", bucket, prefix=inside, maxResults=1)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no bucket {SCHEME}{bucket}; make it (gcloud storage buckets create), or "
            "correct the name"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {SCHEME}{bucket}: {error.strerror}") from error


def generation_of(path: Path) -> int:
    """The generation of an object in a bucket, which every write changes; 0 if there is none.

    Raises:
      OSError: the bucket does not answer.
    """
    bucket, name = _split(path)

    def ask() -> int:
        blob = _client().bucket(bucket).get_blob(name)
        return 0 if blob is None else int(blob.generation)

    return patiently(path, ask)


def write_generation(path: Path, text: str, before: int) -> int | None:
    """Writes an object if it still has the generation that it had before.

    Args:
      before: that generation; 0 if there must be no such object.

    Returns:
      The new generation; None if the object has another one than before, so that nothing is
      written.

    Raises:
      OSError: the bucket does not answer, or nothing may be written to it.
    """
    from google.api_core.exceptions import PreconditionFailed

    bucket, name = _split(path)
    blob = _client().bucket(bucket).blob(name)
    try:
        patiently(path, lambda: blob.upload_from_string(text, if_generation_match=before))
    except PreconditionFailed:
        return None
    return int(blob.generation)


def delete_generation(path: Path, generation: int) -> None:
    """Deletes an object, unless it has another generation by now.

    Raises:
      OSError: the bucket does not answer.
    """
    from google.api_core.exceptions import NotFound, PreconditionFailed

    bucket, name = _split(path)
    blob = _client().bucket(bucket).blob(name)
    with contextlib.suppress(NotFound, PreconditionFailed, FileNotFoundError):
        patiently(path, lambda: blob.delete(if_generation_match=generation))


def _split(path: Path) -> tuple[str, str]:
    """The bucket of a path, and the name of the object in it."""
    bucket, _, name = os.fspath(path).removeprefix(SCHEME).partition("/")
    return bucket, name


@functools.cache
def prepare_packages() -> None:
    """Imports what buckets need, and sets it up; every path in a bucket does so first.

    Raises:
      InputError: a package is not installed.
    """
    try:
        import fsspec.config
        import gcsfs  # noqa: F401 - epath finds it by the scheme
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{SCHEME} needs packages that are not installed: pip install 'plt_jax[gcs]'"
        ) from error
    # A listing that is kept does not show what other processes write.
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    # Every failure reaches the caller as an error, in one line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def file_system() -> Any:
    prepare_packages()
    from etils.epath.backend import fsspec_backend

    return fsspec_backend.fs(SCHEME)


@functools.cache
def _client() -> Any:
    prepare_packages()
    from google.cloud import storage

    return storage.Client()


def patiently(path: Any, call: Callable[[], Result]) -> Result:
    """The result of a call, which is repeated while the bucket does not answer.

    Raises:
      OSError: it has not answered for PATIENCE_SECONDS, or what is asked for cannot be done; its
        `strerror` is a clause for people.
    """
    patience = float(os.environ.get(PATIENCE, PATIENCE_SECONDS))
    deadline, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        with as_os_errors(path):
            try:
                return call()
            except Exception as error:
                if not _is_transient(error) or time.monotonic() + pause > deadline:
                    raise
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_transient(error: Exception) -> bool:
    """Whether the same call may succeed a moment later."""
    import aiohttp
    import gcsfs.retry
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError

    dropped = (aiohttp.ClientError, requests.RequestException, TransportError, TimeoutError)
    busy = (exceptions.ServerError, exceptions.TooManyRequests, exceptions.RetryError)
    if isinstance(error, gcsfs.retry.HttpError):
        return gcsfs.retry.is_retriable(error)
    return isinstance(error, (*dropped, *busy, ConnectionError))


@contextlib.contextmanager
def as_os_errors(path: Any) -> Iterator[None]:
    """Raises what the packages raise as an OSError, whose `strerror` is a clause for people.

    An object that does not exist is a FileNotFoundError. A condition that an object does not meet
    stays what it is.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except (InputError, FailedError):
        raise
    except Exception as error:
        from google.auth.exceptions import GoogleAuthError

        code = str(getattr(error, "code", ""))  # of several libraries, a number or none
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if code in ("404", "412"):
            raise
        if _is_transient(error):
            clause = f"the bucket does not answer ({text})"
            raise OSError(errno.EAGAIN, clause, str(path)) from error
        if code == "401" or isinstance(error, GoogleAuthError):
            clause = (
                "no credentials of Google Cloud are found, or they are refused; run gcloud auth "
                f"application-default login, or set GOOGLE_APPLICATION_CREDENTIALS ({text})"
            )
            raise PermissionError(errno.EACCES, clause, str(path)) from error
        if code == "403" or text.startswith("Forbidden"):
            clause = (
                "the account has no right to do this in the bucket; give it the role "
                f"roles/storage.objectUser ({text})"
            )
            raise PermissionError(errno.EACCES, clause, str(path)) from error
        raise OSError(errno.EIO, text, str(path)) from error
