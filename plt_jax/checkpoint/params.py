"""Reading a checkpoint's parameters alone: all at once, or each where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from plt_jax.checkpoint.orbax_settings import UNREADABLE, bucket_errors, loading, unreadable
from plt_jax.errors import InputError
from plt_jax.files.paths import to_path


class ParamsReader:
    """Reads parameters of one checkpoint, all of them or some."""

    abstract: Any
    """The tree of abstract arrays, with the dtypes that they are read into."""

    def __init__(
        self,
        directory: str | Path,
        step: int,
        abstract: Any,
        as_stored: bool = False,
        dtype: str | None = None,
    ):
        """Reads what the checkpoint says of its arrays.

        Args:
          directory: the folder of the checkpoints.
          step: the checkpoint's step.
          abstract: a tree of abstract arrays, whose shapes, dtypes and shardings the result has.
          as_stored: whether to keep the dtypes that the arrays were stored in.
          dtype: the dtype of all arrays, instead of those of `abstract`.

        Raises:
          InputError: the checkpoint cannot be read, or its arrays have other shapes.
        """
        self._path = _path_of(directory, step)
        self._stored = stored_params(directory, step)
        try:
            differing = differing_shapes(self._stored, abstract)
            if dtype is not None:
                abstract = jax.tree.map(lambda to: to.update(dtype=np.dtype(dtype)), abstract)
            elif as_stored and not differing:
                abstract = jax.tree.map(
                    lambda to, of: to.update(dtype=of.dtype), abstract, self._stored
                )
        except UNREADABLE as error:
            raise unreadable(self._path, error) from error
        if differing:
            raise InputError(
                f"cannot read the checkpoint {self._path}: {differing}; it was trained with "
                "another config"
            )
        self.abstract = abstract

    def read(self, wanted: Any) -> Any:
        """The arrays of a tree that has all or some branches of `abstract`.

        Raises:
          InputError: they cannot be read.
        """
        context = loading(self._stored, wanted)
        context.pytree.loading.partial_load = True
        try:
            with context, bucket_errors(self._path):
                return ocp.load_checkpointables(str(self._path), {"params": wanted})["params"]
        except UNREADABLE as error:
            raise unreadable(self._path, error) from error


class OnDemand(Mapping[str, Any]):
    """A tree of parameters, each of which is read where it is asked for, and not kept.

    So a reader that asks for one after the other never holds all of them.
    """

    def __init__(
        self,
        abstract: Mapping[str, Any],
        read: Callable[[Any], Any],
        others: Mapping[str, Any] | None = None,
    ):
        """Reads nothing yet.

        Args:
          abstract: nested dicts of what `read` takes for each parameter.
          read: returns the parameters of nested dicts that have some branches of `abstract`.
          others: what stands in the place of some parameters, by their names.
        """
        self._abstract, self._read, self._others = abstract, read, dict(others or {})

    def __getitem__(self, name: str) -> Any:
        """A parameter, or the tree below a name."""
        if name in self._others:
            return self._others[name]
        wanted = self._abstract[name]
        if isinstance(wanted, Mapping):
            return OnDemand(wanted, lambda below: self._read({name: below})[name])
        return self._read({name: wanted})[name]

    def together(self, names: Iterable[str]) -> dict[str, Any]:
        """Some parameters, which are read at the same time."""
        wanted = {name: self._abstract[name] for name in names if name not in self._others}
        read = self._read(wanted) if wanted else {}
        return read | {name: self._others[name] for name in names if name in self._others}

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)

    def __contains__(self, name: object) -> bool:
        return name in self._abstract  # Mapping would read the parameter

    def __or__(self, others: Mapping[str, Any]) -> OnDemand:
        """These parameters, with others in the place of some, as of dicts (see `with_loops`)."""
        return OnDemand(self._abstract, self._read, {**self._others, **others})


def load_params(
    directory: str | Path,
    step: int,
    abstract: Any,
    as_stored: bool = False,
    dtype: str | None = None,
) -> Any:
    """The parameters of a checkpoint; the arguments and errors are those of ParamsReader."""
    reader = ParamsReader(directory, step, abstract, as_stored, dtype)
    return reader.read(reader.abstract)


def stored_params(directory: str | Path, step: int) -> Any:
    """What a checkpoint says of its parameters: a tree of dicts, with shapes and dtypes.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    path = _path_of(directory, step)
    try:
        with bucket_errors(path):
            return ocp.metadata(str(path), "params").metadata
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def differing_shapes(stored: Any, wanted: Any) -> str:
    """A text about the first parameter whose shape differs between two trees; "" if none does."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in leaves
        }

    stored, wanted = shapes(stored), shapes(wanted)
    for name in sorted(stored | wanted):
        if stored.get(name) != wanted.get(name):
            return f"{name} has shape {stored.get(name)} there, and {wanted.get(name)} in the model"
    return ""


def _path_of(directory: str | Path, step: int) -> Path:
    return (to_path(directory) / str(step)).absolute()
