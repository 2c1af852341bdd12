"""The manifest of a checkpoint: its files with their sizes and checksums, and how they are checked.

The manifest is the last file that is written, on a disk before the checkpoint gets its name. Every
checkpoint has one, but for those of earlier versions. CRC-32 detects every damage of up to 32 bits
in a row, and misses one in four billion of all others; it is the fastest checksum of the standard
library. It does not protect against changes on purpose.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from plt_jax.errors import InputError
from plt_jax.files.paths import files_in
from plt_jax.files.reading import MOST_JSON_BYTES, file_below, read_bounded
from plt_jax.files.writing import write_synced

MANIFEST = "manifest.json"
MARK: dict[str, Any] = {"manifest": MANIFEST}
"""Orbax's metadata of a checkpoint with a manifest; it tells where a manifest is missing."""
METADATA = "_CHECKPOINT_METADATA"
"""Orbax's file of the metadata."""
OWN = "crc32_of_the_rest"
"""The manifest's field for the checksum of its other fields."""
CHUNK_BYTES = 1 << 22
THREADS = min(4, os.cpu_count() or 1)


class File(NamedTuple):
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    crc32: int


class CheckpointManifest(NamedTuple):
    """The files of a checkpoint, and what it was saved with."""

    saved: float
    """The time of the save, in seconds since 1970."""
    validation_loss: float | None
    """Nats per token; None if the step was not evaluated."""
    files: dict[str, File]
    """The files, by their path in the checkpoint, with slashes."""

    @property
    def size(self) -> int:
        """Bytes of all the files."""
        return sum(file.size for file in self.files.values())


class DamagedError(ValueError):
    """A manifest is not as it was written; the message says how."""


def own_files(checkpoint: Path, index: int) -> list[str]:
    """The paths of the files in a checkpoint that process `index` has written.

    Orbax names files by the process that writes them; process 0 writes all that have no such name.
    """
    return [name for name in files_in(checkpoint) if _writer(name) == index]


def take_checksums(checkpoint: Path, names: Iterable[str]) -> dict[str, File]:
    """Reads files and returns their sizes and checksums, by path.

    Raises:
      OSError: a file cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:  # reading and zlib release the GIL
        return dict(zip(names, pool.map(lambda name: _read(checkpoint / name), names), strict=True))


def write_manifest(
    checkpoint: Path, files: dict[str, File], validation_loss: float | None = None
) -> None:
    """Writes a checkpoint's manifest, and waits until it is on the disk.

    Raises:
      OSError: it cannot be written.
    """
    manifest = CheckpointManifest(time.time(), validation_loss, files)
    write_synced(checkpoint / MANIFEST, _dump(manifest._asdict()))


def read_manifest(checkpoint: Path) -> CheckpointManifest | None:
    """A checkpoint's manifest; None if an earlier version wrote the checkpoint without one.

    Raises:
      DamagedError: the manifest is missing though there was one, or is not as it was written.
    """
    try:
        text = read_bounded(checkpoint / MANIFEST, MOST_JSON_BYTES).decode()
        fields = json.loads(text)
        fields.pop(OWN)
        if _dump(fields) != text:
            raise DamagedError(f"{MANIFEST} has another checksum")
        return _manifest_of(fields)
    except FileNotFoundError as error:
        if _marked(checkpoint):
            raise DamagedError(f"{MANIFEST} is missing") from error
        return None
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (DamagedError, InputError) as error:
        raise DamagedError(str(error)) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not as it was written") from error


def _manifest_of(fields: dict[str, Any]) -> CheckpointManifest:
    """The manifest of a JSON mapping; raises ValueError or TypeError for other values."""
    saved, loss = float(fields.pop("saved")), fields.pop("validation_loss")
    files = {}
    for name, (size, crc32) in fields.pop("files").items():
        if not (isinstance(size, int) and isinstance(crc32, int)):
            raise TypeError
        files[name] = File(size, crc32)
    if fields:
        raise ValueError
    return CheckpointManifest(saved, None if loss is None else float(loss), files)


def validation_loss(checkpoint: Path) -> float | None:
    """The validation loss that a checkpoint was saved with, in nats per token; None if unknown."""
    try:
        manifest = read_manifest(checkpoint)
        if manifest is not None:
            return manifest.validation_loss
        # In earlier versions orbax stored it.
        metrics = (checkpoint / "metrics" / "metrics").read_text(encoding="utf-8")
        return json.loads(metrics)["validation_loss"]
    except (OSError, ValueError, KeyError):
        return None


def has_checksums(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest to check it against, even a damaged one."""
    try:
        return read_manifest(checkpoint) is not None
    except DamagedError:
        return True


def find_damage(
    checkpoint: Path,
    inside: Collection[str] | None = None,
    *,
    index: int = 0,
    count: int = 1,
    contents: bool = True,
) -> list[str]:
    """The damage of a checkpoint's files, one text for each damaged file.

    Nothing is found in checkpoints of earlier versions, which have no checksums.

    Args:
      inside: the folders of the checkpoint to check; default all. The files that lie directly in it
        are always checked.
      index, count: which part of the files to check, of how many, so that processes can share the
        reading.
      contents: whether to read the files; otherwise only their sizes are compared.
    """
    try:
        manifest = read_manifest(checkpoint)
    except DamagedError as error:
        return [str(error)]
    if manifest is None:
        return []
    files = {
        name: file
        for name, file in manifest.files.items()
        if inside is None or "/" not in name or name.split("/")[0] in inside
    }
    # The largest come first, so that the parts are of similar size.
    names = sorted(files, key=lambda name: (-files[name].size, name))[index::count]

    def compare(name: str) -> str:
        try:
            return _compare(file_below(checkpoint, name), name, files[name], contents)
        except InputError as error:  # a name that leads elsewhere is not followed
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        return sorted(filter(None, pool.map(compare, names)))


def _compare(path: Path, name: str, expected: File, contents: bool) -> str:
    """The damage of one file; "" if there is none."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size:,} bytes instead of {expected.size:,}"
        if contents and _read(path) != expected:
            return f"{name} has another checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return ""


def _read(path: Path) -> File:
    size, crc, buffer = 0, 0, memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib.crc32(buffer[:count], crc)
    return File(size, crc)


def _writer(name: str) -> int:
    named = re.search(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)", name)
    return int(named[1]) if named else 0


def _marked(checkpoint: Path) -> bool:
    try:
        metadata = json.loads((checkpoint / METADATA).read_bytes())
        return metadata["custom_metadata"] == MARK
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _dump(fields: dict[str, Any]) -> str:
    """The text of a manifest, with the checksum of its other fields; the same fields give the same
    text."""
    crc = zlib.crc32(json.dumps(fields).encode())
    return json.dumps({**fields, OWN: crc}, indent=1) + "\n"
