"""Where each parameter lies in a Hugging Face checkpoint: one table, used in both directions.

The parameters themselves, with their shapes, are those that the model declares. A torch Linear
keeps its weight as [outputs, inputs]; ours keep inputs first, and heads apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from plt_jax.config import ModelConfig
from plt_jax.model.block import block_parameters, stacks_of
from plt_jax.model.transformer import top_parameters


class Place(NamedTuple):
    """The tensors of a parameter."""

    name: str
    """With {layer} and {expert} to fill in; a parameter of experts has one tensor for each."""
    inputs: int | None = 0
    """How many of the parameter's leading axes (behind the experts') are a Linear's inputs. 0: the
    tensor is the parameter, flattened; None: as it is."""


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."

TOP = {
    "embedding": Place("model.embed_tokens.weight", None),
    "final_norm": Place("model.norm.weight"),
    "head": Place("lm_head.weight", 1),
}
LAYERS = {
    "attention_norm": Place(_LAYER + "input_layernorm.weight"),
    "q": Place(_ATTENTION + "q_proj.weight", 1),
    "k": Place(_ATTENTION + "k_proj.weight", 1),
    "v": Place(_ATTENTION + "v_proj.weight", 1),
    "o": Place(_ATTENTION + "o_proj.weight", 2),
    "q_bias": Place(_ATTENTION + "q_proj.bias"),
    "k_bias": Place(_ATTENTION + "k_proj.bias"),
    "v_bias": Place(_ATTENTION + "v_proj.bias"),
    "o_bias": Place(_ATTENTION + "o_proj.bias"),
    "q_norm": Place(_ATTENTION + "q_norm.weight"),
    "k_norm": Place(_ATTENTION + "k_norm.weight"),
    "ffn_norm": Place(_LAYER + "post_attention_layernorm.weight"),
    "ffn_output_norm": Place(_LAYER + "post_feedforward_layernorm.weight"),
    "ffn_gate": Place(_MLP + "gate_proj.weight", 1),
    "ffn_up": Place(_MLP + "up_proj.weight", 1),
    "ffn_down": Place(_MLP + "down_proj.weight", 1),
    "router": Place(_MLP + "gate.weight", 1),
    "expert_gate": Place(_MLP + "experts.{expert}.gate_proj.weight", 1),
    "expert_up": Place(_MLP + "experts.{expert}.up_proj.weight", 1),
    "expert_down": Place(_MLP + "experts.{expert}.down_proj.weight", 1),
    "shared_gate_proj": Place(_MLP + "shared_expert.gate_proj.weight", 1),
    "shared_up": Place(_MLP + "shared_expert.up_proj.weight", 1),
    "shared_down": Place(_MLP + "shared_expert.down_proj.weight", 1),
    "shared_router": Place(_MLP + "shared_expert_gate.weight", 1),
}

GATES = {
    "plt": (_ATTENTION + "plt_gate", _ATTENTION + "loop_gate_proj"),
    "loop_kv_share_window": ("model.gate_projections.{layer}",),
}
"""What the G-SWA gate's tensors are called in each scheme; the first is written, all are read."""


def is_gate(name: str) -> bool:
    """Whether a tensor belongs to a G-SWA gate, by any of its names."""
    parts = ("plt_gate", "loop_gate_proj", "gate_projections")
    return any(part in name.split(".") for part in parts)


IGNORED = "rotary_emb.inv_freq"
"""A buffer that older checkpoints hold, computed from the config."""


class Piece(NamedTuple):
    """One parameter of one layer (or of none): the unit that is read, placed and written."""

    path: tuple[str, ...]
    """In the parameters' tree, where layers are stacked."""
    layer: int | None
    """In its stack."""
    shape: tuple[int, ...]
    """Of the parameter, the layers' axis left out."""
    names: tuple[str, ...]
    """Its tensor, or one for each expert."""
    inputs: int | None
    by_expert: bool

    @property
    def shape_of_one(self) -> tuple[int, ...]:
        """Of the parameter, the experts' axis left out too."""
        return self.shape[1:] if self.by_expert else self.shape

    @property
    def flattened(self) -> list[range]:
        """For each axis of a tensor, the axes of `shape_of_one` that lie flattened in it."""
        axes = range(len(self.shape_of_one))
        if self.inputs is None:
            return [axes[axis : axis + 1] for axis in axes]
        if self.inputs == 0:
            return [axes]
        return [axes[self.inputs :], axes[: self.inputs]]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        shape = self.shape_of_one
        return tuple(math.prod(shape[axis] for axis in axes) for axes in self.flattened)


def pieces_of(config: ModelConfig, present: Collection[str] = ()) -> list[Piece]:
    """All pieces of a model, in the order in which checkpoints hold them.

    Args:
      present: the tensors of a checkpoint to read, among which gates may have an older name.
    """
    top, places = top_parameters(config), LAYERS | _gate_places(config, present)
    pieces = [_piece(("embedding",), None, top["embedding"].shape, TOP["embedding"])]
    before = 0
    for name, stack in stacks_of(config).items():
        layer = block_parameters(config, stack.mixture)
        pieces += [
            _piece((name, parameter), index, declared.shape, places[parameter], before + index)
            for index in range(stack.layers)
            for parameter, declared in layer.items()
        ]
        before += stack.layers
    return pieces + [
        _piece((name,), None, top[name].shape, TOP[name])
        for name in ("final_norm", "head")
        if name in top
    ]


def _gate_places(config: ModelConfig, present: Collection[str]) -> dict[str, Place]:
    known = GATES.get(config.loop.scheme)
    if known is None:
        return {}
    prefix = next((p for p in known if p.format(layer=0) + ".weight" in present), known[0])
    return {
        "gate_weight": Place(f"{prefix}.weight", 1 if config.loop.gate_input == "hidden" else None),
        "gate_bias": Place(f"{prefix}.bias"),
        "gate_norm": Place(f"{prefix}.gate_norm.weight"),
    }


def _piece(
    path: tuple[str, ...],
    layer: int | None,
    shape: tuple[int, ...],
    place: Place,
    number: int | None = None,
) -> Piece:
    """A piece; `number` is the layer's among all."""
    by_expert = "{expert}" in place.name
    names = tuple(
        place.name.format(layer=number, expert=expert)
        for expert in range(shape[0] if by_expert else 1)
    )
    return Piece(path, layer, shape, names, place.inputs, by_expert)


def read_part(
    read: Callable[[str, tuple[slice, ...]], np.ndarray], piece: Piece, index: tuple[slice, ...]
) -> np.ndarray:
    """A part of a piece, in the parameter's layout.

    Args:
      read: gives a part of a tensor by its name.
      index: which part, by the axes of `piece.shape`.
    """
    names = piece.names
    if piece.by_expert:
        names, index = names[index[0]], index[1:]
    whole = piece.shape_of_one
    # Of the axes that lie flattened in one, the first is cut while reading, the others after it.
    tensor_index, read_shape, rest = [], list(whole), list(index)
    for first, *inner in piece.flattened:
        start, stop, _ = index[first].indices(whole[first])
        stride = math.prod(whole[axis] for axis in inner)
        tensor_index.append(slice(start * stride, stop * stride))
        read_shape[first], rest[first] = stop - start, slice(None)

    def part(name: str) -> np.ndarray:
        if not piece.inputs:
            values = read(name, tuple(tensor_index))
        else:
            rows, columns = tensor_index

            def read_rows(start: int, stop: int) -> np.ndarray:
                return read(name, (slice(rows.start + start, rows.start + stop), columns))

            sizes = (rows.stop - rows.start, columns.stop - columns.start)
            values = transposed(read_rows, sizes)
        return values.reshape(read_shape)[tuple(rest)]

    return np.stack([part(name) for name in names]) if piece.by_expert else part(names[0])


def to_tensor(parameter: np.ndarray, piece: Piece) -> np.ndarray:
    """The tensor of a parameter, without its layers' and experts' axes."""
    if not piece.inputs:
        return np.ascontiguousarray(parameter).reshape(piece.tensor_shape)
    outputs, inputs = piece.tensor_shape
    matrix = parameter.reshape(inputs, outputs)
    return transposed(lambda start, stop: matrix[start:stop], matrix.shape)


_BLOCK = 256  # Rows that are read at a time: they are still in the core's cache when transposed.
_STRIP = 16  # Rows that are transposed at a time: a cache line of the output, or two.
_POOL = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="transpose")


def transposed(rows: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The transpose of a matrix that is read in blocks of rows, on all cores.

    Args:
      rows: gives those from one number to another.
      shape: of the matrix.
    """
    first = rows(0, min(_BLOCK, shape[0]))
    out = np.empty(shape[::-1], first.dtype)
    # numpy copies dtypes that are not its own value by value.
    bits = np.dtype(f"u{first.dtype.itemsize}")
    target = out.view(bits)

    def copy(start: int) -> None:
        block = first if start == 0 else rows(start, min(start + _BLOCK, shape[0]))
        for row in range(0, len(block), _STRIP):
            strip = block[row : row + _STRIP].view(bits)
            target[:, start + row : start + row + len(strip)] = strip.T

    list(_POOL.map(copy, range(0, shape[0], _BLOCK)))
    return out
