"""Checkpoints whose large weights are stored in eight bits.

Such a weight is two arrays, `values` and `scales`, in the place of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from plt_jax.checkpoint.params import ParamsReader, stored_params
from plt_jax.decoding.quantization import Quantized, is_quantized, quantize_params

PARTS = {"values", "scales"}


def is_quantized_checkpoint(directory: str | Path, step: int) -> bool:
    """Whether a checkpoint holds weights in eight bits.

    Raises:
      InputError: it cannot be read.
    """
    return _holds_parts(stored_params(directory, step))


class QuantizedReader:
    """Reads parameters of such a checkpoint, all or some, as `quantize_params` gives them."""

    abstract: Any
    """The tree of abstract arrays, with Quantized ones."""

    def __init__(self, directory: str | Path, step: int, abstract: Any):
        """Reads what the checkpoint says of its arrays.

        Args:
          abstract: abstract arrays of the parameters before they were rounded, with their
            shardings.

        Raises:
          InputError: see ParamsReader.
        """
        rounded = jax.tree.map(
            _placed, jax.eval_shape(quantize_params, abstract), abstract, is_leaf=is_quantized
        )
        self._reader = ParamsReader(directory, step, to_parts(rounded), as_stored=True)
        self.abstract = _from_parts(self._reader.abstract)

    def read(self, wanted: Any) -> Any:
        """See ParamsReader."""
        return _from_parts(self._reader.read(to_parts(wanted)))


def to_parts(params: Any) -> Any:
    """Parameters with a dict of `values` and `scales` in the place of each Quantized weight."""

    def parts(leaf: Any) -> Any:
        return {name: getattr(leaf, name) for name in PARTS} if is_quantized(leaf) else leaf

    return jax.tree.map(parts, params, is_leaf=is_quantized)


def _from_parts(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == PARTS:
        return Quantized(**tree)
    return {name: _from_parts(value) for name, value in tree.items()}


def _holds_parts(tree: Any) -> bool:
    return isinstance(tree, Mapping) and (
        set(tree) == PARTS or any(map(_holds_parts, tree.values()))
    )


def _placed(rounded: Any, declared: Any) -> Any:
    """Abstract arrays of a weight that lie as the declared weight does."""

    def placed(leaf: Any) -> Any:
        sharding = declared.sharding
        axes = (*sharding.spec, *[None] * leaf.ndim)
        # Scales have 1 where they are shared.
        spec = [axis if size > 1 else None for axis, size in zip(axes, leaf.shape, strict=False)]
        return leaf.update(sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))

    return jax.tree.map(placed, rounded)
