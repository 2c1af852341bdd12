"""A folder of safetensors files: one file, or several files with an index.

All headers are read and checked first. Rows of tensors are then read from the files, or from the
objects of a bucket, a few ahead of those that are in use.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from plt_jax.buckets.address import is_in_bucket
from plt_jax.errors import InputError
from plt_jax.files.folders import local_file
from plt_jax.files.reading import check_regular, read_json, read_range

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


AHEAD_BYTES = 2**28
"""The bytes of rows that are read ahead."""


class Tensor(NamedTuple):
    """A tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    """The position of its first byte in the file."""

    def bytes_of(self, start: int, stop: int) -> tuple[int, int]:
        """The position in the file of the first byte of some rows, and that behind their last."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self.offset + start * row, self.offset + stop * row


class Rows(NamedTuple):
    """Rows of a tensor, counted along its first axis."""

    name: str
    """The tensor's."""
    start: int
    stop: int


class SafetensorsFolder:
    """The tensors of a checkpoint, read on demand.

    Attributes:
      tensors: their descriptions, by name.
    """

    def __init__(self, folder: Path, ignored: str):
        """Reads all headers.

        Args:
          folder: a folder, on a disk or in a bucket.
          ignored: tensors whose names end in this are left out.

        Raises:
          InputError: there are no such files; the index is broken, or names a file or tensor that
            is missing; a file is truncated or damaged; a tensor is not float32, float16 or
            bfloat16.
        """
        self.folder = folder
        self._ignored = ignored
        self.tensors: dict[str, Tensor] = {}
        index = _read_index(folder)
        for file in [folder / SINGLE] if index is None else sorted(set(index.values())):
            self._add_header(file)
        for name, file in ({} if index is None else index).items():
            found = self.tensors.get(name)
            if name.endswith(ignored):
                continue
            if found is None or found.file != file:
                raise InputError(f"{folder / INDEX} says that {name} is in {file.name}; it is not")

    def read(self, name: str) -> np.ndarray:
        """A whole tensor.

        Raises:
          InputError: the file cannot be read.
        """
        (values,) = self.read_rows([Rows(name, 0, (*self.tensors[name].shape, 1)[0])])
        return values.copy()

    def read_rows(self, wanted: Iterable[Rows]) -> Iterator[np.ndarray]:
        """Yields rows of tensors, [stop - start, ...], in the order in which they are wanted.

        What was yielded may be used until the next rows are. Rows of a file are not copied into the
        process's memory, which holds the pages of the rows in use alone; the operating system is
        asked to read the next ones. Rows of an object in a bucket are read ahead.

        Raises:
          InputError: a file cannot be read.
        """
        left, ahead = deque(wanted), deque[tuple[Rows, int, Future[bytes | None]]]()
        opened: dict[Path, mmap.mmap] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as pool:
            try:
                while left or ahead:
                    while left and sum(size for _, size, _ in ahead) < AHEAD_BYTES:
                        rows = left.popleft()
                        tensor = self.tensors[rows.name]
                        first, end = tensor.bytes_of(rows.start, rows.stop)
                        future = pool.submit(_read_ahead, tensor.file, first, end)
                        ahead.append((rows, end - first, future))
                    rows, _, future = ahead.popleft()
                    try:
                        array = self._array(rows, future.result(), opened)
                    except (OSError, ValueError) as error:  # ValueError: it has become shorter
                        file = self.tensors[rows.name].file
                        reason = _line(error)
                        raise InputError(
                            f"cannot read {rows.name} from {file}: {reason}"
                        ) from error
                    yield array
            finally:
                for _, _, future in ahead:
                    future.cancel()

    def _array(
        self, rows: Rows, content: bytes | None, opened: dict[Path, mmap.mmap]
    ) -> np.ndarray:
        tensor = self.tensors[rows.name]
        shape = (rows.stop - rows.start, *tensor.shape[1:]) if tensor.shape else ()
        first, _ = tensor.bytes_of(rows.start, rows.stop)
        if content is not None:
            return np.frombuffer(content, tensor.dtype).reshape(shape)
        if tensor.file not in opened:
            opened.clear()  # the map of another file ends with its last array
            with open(tensor.file, "rb") as file:
                opened[tensor.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = opened[tensor.file]
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # they stay in the page cache
        return np.frombuffer(mapped, tensor.dtype, math.prod(shape), first).reshape(shape)

    def _add_header(self, file: Path) -> None:
        try:
            with _open_header(file) as (handle, offsets):
                names = handle.keys()
                for name in names:
                    if name.endswith(self._ignored):
                        continue
                    header = handle.get_slice(name)
                    dtype = DTYPES.get(header.get_dtype())
                    if dtype is None:
                        raise InputError(
                            f"{file}: {name} has dtype {header.get_dtype()}; only "
                            f"{', '.join(DTYPES)} are read, so give a checkpoint that is not "
                            "quantised"
                        )
                    if name in self.tensors:
                        raise InputError(f"{name} is in both {self.tensors[name].file} and {file}")
                    shape = tuple(header.get_shape())
                    self.tensors[name] = Tensor(file, shape, dtype, offsets[name])
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is not a complete safetensors file ({_line(error)}); download it again"
            ) from error


@contextlib.contextmanager
def _open_header(file: Path) -> Iterator[tuple[safe_open, dict[str, int]]]:
    """A file whose header safetensors has checked, and the position of each tensor in the file.

    Raises:
      SafetensorError, OSError: it is damaged or cannot be read.
    """
    check_regular(file)
    with contextlib.ExitStack() as stack:
        checked = file
        if is_in_bucket(file):
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="plt_jax-"))
            # A file with the same header, and with holes in the place of the tensors.
            size = file.stat().st_size
            header = read_range(file, 0, min(8, size))
            header += read_range(file, 8, min(8 + int.from_bytes(header, "little"), size))
            checked = Path(home) / SINGLE
            checked.write_bytes(header)
            os.truncate(checked, size)
        handle = stack.enter_context(safe_open(checked, framework="numpy"))
        with open(checked, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            tensors = json.loads(opened.read(length))
        tensors.pop("__metadata__", None)
        yield handle, {name: 8 + length + one["data_offsets"][0] for name, one in tensors.items()}


def _read_ahead(file: Path, first: int, end: int) -> bytes | None:
    """The bytes of an object in a bucket; None for a file, whose bytes the operating system is
    asked to read."""
    if is_in_bucket(file):
        return read_range(file, first, end)
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), first, end - first, os.POSIX_FADV_WILLNEED)
    return None


def _read_index(folder: Path) -> dict[str, Path] | None:
    """The file of each tensor, by name, as the index says; None if there is a single file.

    Raises:
      InputError: see `SafetensorsFolder`.
    """
    if (folder / SINGLE).exists():
        return None
    path = folder / INDEX
    if not path.exists():
        others = sorted(
            file.name for kind in ("*.safetensors", "*.bin", "*.pt*") for file in folder.glob(kind)
        )
        held = f"; it holds {', '.join(others[:3])}" if others else ""
        raise InputError(
            f"{folder} has neither {SINGLE} nor {INDEX}{held}; only safetensors checkpoints are "
            "read"
        )
    index = read_index(path)
    for name, file in index.items():
        if not _exists(file):
            raise InputError(
                f"{file} is missing, but {path} says that it holds {name}; download it"
            )
    return index


def _exists(file: Path) -> bool:
    """Whether there is a file; False also for an impossible name."""
    return file.exists() if is_in_bucket(file) else os.path.exists(file)


def read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor, by name, as an index says; the files need not exist.

    Raises:
      InputError: it is no index, or names what is no safetensors file in its folder.
    """
    try:
        files = read_json(path)["weight_map"]
        index = {name: path.parent / file for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not an index of safetensors files ({_line(error)}); download it again"
        ) from error
    for name, file in index.items():
        if file.parent != path.parent or file.suffix != ".safetensors":
            raise InputError(
                f"{path} says that {name} is in {files[name]!r}, which is not a safetensors file "
                "in its folder"
            )
    return index


def write_safetensors(
    folder: Path,
    sizes: Mapping[str, int],
    make_tensor: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes one file if all tensors fit into it, and otherwise several files and their index.

    Args:
      sizes: the size of each tensor in bytes, by name, in the order in which they are written.
      make_tensor: returns a tensor by its name. The tensors of one file are in memory at a time.
      shard_bytes: size limit of a file's tensors, in bytes. Only a single tensor may exceed it.

    Raises:
      OSError: a file cannot be written.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {name: make_tensor(name) for name in names}
        with local_file(folder / file) as path:
            try:
                save_file(arrays, path, metadata={"format": "pt"})  # transformers needs it
            except SafetensorError as error:
                raise OSError(_line(error)) from error
            path.chmod(0o644)  # safetensors makes files that only their owner can read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _line(error: Exception) -> str:
    """An error's message as one line of bounded length."""
    return " ".join(str(error).split())[:300]
