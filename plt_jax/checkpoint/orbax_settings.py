"""How orbax reads and writes here, and what its errors mean."""

from __future__ import annotations

import logging
import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from plt_jax.buckets.address import is_in_bucket
from plt_jax.checkpoint.byte_limits import byte_limit, bytes_read, shard_bytes
from plt_jax.errors import InputError

# Orbax logs every save and restore in several lines, and failures with their stack traces. What
# users need to know is printed here.
logging.getLogger("absl").setLevel(logging.CRITICAL)

CHUNK_BYTES = 2**22
"""The most bytes of a stored piece of an array. A piece is read as a whole by each process that
needs some of it."""
FAILURES = (OSError, ValueError, RuntimeError)
"""What orbax, tensorstore (a ValueError for a full disk) and JAX raise where saving fails."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What they raise where files are missing or not as expected."""


def saving(trees: Any) -> ocp.Context:
    """How arrays are written: in small pieces, so that processes of any other mesh read little more
    than their parts, and as they are, since compressing them takes longer than writing them."""
    context = ocp.Context()
    # A folder that cannot be made fails at once, with its reason.
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    arrays = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
    context.memory.write_concurrent_bytes = byte_limit(arrays, map(shard_bytes, arrays))
    return context


def loading(stored: Any, wanted: Any) -> ocp.Context:
    """How arrays are read: a few shards at a time.

    Args:
      stored: what the checkpoint says of its arrays.
      wanted: abstract arrays. Those of one shape may be stored in any order.
    """
    by_shape: dict[tuple[int, ...], list[Any]] = {}
    for leaf in jax.tree.leaves(stored):
        if getattr(leaf, "storage_metadata", None) is not None:
            by_shape.setdefault(tuple(leaf.shape), []).append(leaf)
    context = ocp.Context()
    arrays = jax.tree.leaves(wanted)
    context.memory.read_concurrent_bytes = byte_limit(
        arrays,
        (bytes_read(array, leaf) for leaf in arrays for array in by_shape.get(leaf.shape, ())),
    )
    return context


def bucket_errors(path: Path) -> AbstractContextManager[None]:
    """Raises what orbax lets through of a bucket's errors as an OSError."""
    if not is_in_bucket(path):
        return nullcontext()
    from plt_jax.buckets.service import as_os_errors  # its packages are an extra

    return as_os_errors(path)


def unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"cannot read the checkpoint {path}: {reason(error)}")


def reason(error: Exception) -> str:
    """The reason why files could not be written or read, in a few words."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's ValueError has it
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__
