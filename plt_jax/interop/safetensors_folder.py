"""A folder of safetensors files: one file, or several files with an index.

All headers are read and checked first. Tensors are then read one at a time, or in part. Files that
are no longer needed can be closed, so that memory holds only those that are being read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from plt_jax.errors import InputError
from plt_jax.files import check_regular, local_file, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Tensor(NamedTuple):
    """A tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsFolder:
    """The tensors of a checkpoint, read on demand.

    Attributes:
      tensors: their descriptions, by name.
    """

    def __init__(self, folder: Path, ignored: str):
        """Reads all headers.

        Args:
          ignored: tensors whose names end in this are left out.

        Raises:
          InputError: there are no such files; the index is broken, or names a file or tensor that
            is missing; a file is truncated or damaged; a tensor is not float32, float16 or
            bfloat16.
        """
        self.folder = folder
        self._ignored = ignored
        self._open: dict[Path, Any] = {}
        self._read_ahead: set[Path] = set()
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

    def read(self, name: str, index: tuple[slice | EllipsisType, ...] = (...,)) -> np.ndarray:
        """A tensor, or a part of it, as a new array.

        Raises:
          InputError: the file cannot be read.
        """
        file = self.tensors[name].file
        try:
            return self._handle(file).get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot read {name} from {file}: {_line(error)}") from error

    def keep_open(self, names: Sequence[str]) -> None:
        """Prepares to read these tensors, in this order, and no others.

        Files that hold none of them are closed. The operating system is asked to read the next two
        files ahead.
        """
        needed = list(dict.fromkeys(self.tensors[name].file for name in names))
        for file in [file for file in self._open if file not in needed]:
            del self._open[file]  # its memory map goes with it
        for file in needed[:2]:
            if file not in self._read_ahead and hasattr(os, "posix_fadvise"):
                self._read_ahead.add(file)
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _add_header(self, file: Path) -> None:
        try:
            handle = self._handle(file)
            names = handle.keys()
            for name in names:
                if name.endswith(self._ignored):
                    continue
                header = handle.get_slice(name)
                dtype = DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise InputError(
                        f"{file}: {name} has dtype {header.get_dtype()}; only "
                        f"{', '.join(DTYPES)} are read, so give a checkpoint that is not quantised"
                    )
                if name in self.tensors:
                    raise InputError(f"{name} is in both {self.tensors[name].file} and {file}")
                self.tensors[name] = Tensor(file, tuple(header.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is not a complete safetensors file ({_line(error)}); download it again"
            ) from error

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            check_regular(file)
            self._open[file] = safe_open(file, framework="numpy")
        return self._open[file]


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
        if not os.path.exists(file):  # False also for an impossible name
            raise InputError(
                f"{file} is missing, but {path} says that it holds {name}; download it"
            )
    return index


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
