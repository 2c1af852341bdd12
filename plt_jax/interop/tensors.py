"""The tensors of each parameter in a Hugging Face checkpoint: one table for both directions.

The parameters and their shapes are those that the model declares. A torch Linear stores its weight
as [outputs, inputs]. Our weights have the inputs first, and heads on an axis of their own.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import flax.linen as nn
from flax.traverse_util import flatten_dict

from plt_jax.config import ModelConfig
from plt_jax.model.block import block_parameters, stacks_of
from plt_jax.model.transformer import top_parameters

Params = dict[str, Any]
"""Nested parameters as `Transformer.init` gives them."""


def leaves_by_path(params: Params) -> dict[tuple[str, ...], Any]:
    """The unboxed leaves of nested parameters, or of a tree of the same structure."""
    return flatten_dict(nn.unbox(params))


class TensorMapping(NamedTuple):
    """How a parameter is stored in tensors."""

    name: str
    """The tensor's name, with {layer} and {expert} to fill in. An experts' parameter has one tensor
    for each expert."""
    input_axes: int | None = 0
    """The number of the parameter's leading axes (after the experts' axis) that are a Linear's
    inputs. With 0 the tensor is the flattened parameter; with None it has the parameter's shape."""


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."

TOP = {
    "embedding": TensorMapping("model.embed_tokens.weight", None),
    "final_norm": TensorMapping("model.norm.weight"),
    "exit_gate": TensorMapping("model.early_exit_gate.weight", 1),
    "exit_gate_bias": TensorMapping("model.early_exit_gate.bias"),
    "head": TensorMapping("lm_head.weight", 1),
}
LAYERS = {
    "attention_norm": TensorMapping(_LAYER + "input_layernorm.weight"),
    "q": TensorMapping(_ATTENTION + "q_proj.weight", 1),
    "k": TensorMapping(_ATTENTION + "k_proj.weight", 1),
    "v": TensorMapping(_ATTENTION + "v_proj.weight", 1),
    "o": TensorMapping(_ATTENTION + "o_proj.weight", 2),
    "q_bias": TensorMapping(_ATTENTION + "q_proj.bias"),
    "k_bias": TensorMapping(_ATTENTION + "k_proj.bias"),
    "v_bias": TensorMapping(_ATTENTION + "v_proj.bias"),
    "o_bias": TensorMapping(_ATTENTION + "o_proj.bias"),
    "q_norm": TensorMapping(_ATTENTION + "q_norm.weight"),
    "k_norm": TensorMapping(_ATTENTION + "k_norm.weight"),
    "ffn_norm": TensorMapping(_LAYER + "post_attention_layernorm.weight"),
    "ffn_output_norm": TensorMapping(_LAYER + "post_feedforward_layernorm.weight"),
    "ffn_gate": TensorMapping(_MLP + "gate_proj.weight", 1),
    "ffn_up": TensorMapping(_MLP + "up_proj.weight", 1),
    "ffn_down": TensorMapping(_MLP + "down_proj.weight", 1),
    "router": TensorMapping(_MLP + "gate.weight", 1),
    "expert_gate": TensorMapping(_MLP + "experts.{expert}.gate_proj.weight", 1),
    "expert_up": TensorMapping(_MLP + "experts.{expert}.up_proj.weight", 1),
    "expert_down": TensorMapping(_MLP + "experts.{expert}.down_proj.weight", 1),
    "shared_gate_proj": TensorMapping(_MLP + "shared_expert.gate_proj.weight", 1),
    "shared_up": TensorMapping(_MLP + "shared_expert.up_proj.weight", 1),
    "shared_down": TensorMapping(_MLP + "shared_expert.down_proj.weight", 1),
    "shared_router": TensorMapping(_MLP + "shared_expert_gate.weight", 1),
}

SANDWICH = {
    "attention_output_norm": TensorMapping(_LAYER + "input_layernorm_2.weight"),
    "ffn_output_norm": TensorMapping(_LAYER + "post_attention_layernorm_2.weight"),
}
"""The output norms of a layer that has input norms, too (Ouro's names)."""
POST_NORM = {"attention_output_norm": TensorMapping(_LAYER + "post_attention_layernorm.weight")}
"""The output norms of a layer without input norms (OLMo 2's names)."""

GATE_PREFIXES = {
    "plt": (_ATTENTION + "plt_gate", _ATTENTION + "loop_gate_proj"),
    "loop_kv_share_window": ("model.gate_projections.{layer}",),
}
"""The name prefixes of the G-SWA gate's tensors, by scheme. All of them are read; the first one is
written."""


def is_gate(name: str) -> bool:
    """Whether a tensor's name, in any scheme, is that of a G-SWA gate."""
    parts = ("plt_gate", "loop_gate_proj", "gate_projections")
    return any(part in name.split(".") for part in parts)


IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""The end of the names of buffers that older checkpoints hold; config.json determines them."""


class UnstackedParameter(NamedTuple):
    """A parameter of one layer, or one that no layer has: the unit that is read and written."""

    path: tuple[str, ...]
    """The path in the parameters, where layers are stacked."""
    layer: int | None
    """The index in the stack of layers; None for a parameter that no layer has."""
    shape: tuple[int, ...]
    """The parameter's shape without the layers' axis."""
    tensor_names: tuple[str, ...]
    """The name of its tensor, or one name for each expert."""
    input_axes: int | None
    """See `TensorMapping`."""
    by_expert: bool
    """Whether it has one tensor for each expert."""

    @property
    def expert_shape(self) -> tuple[int, ...]:
        """The parameter's shape without the experts' axis, if it has one."""
        return self.shape[1:] if self.by_expert else self.shape

    @property
    def flattened_axes(self) -> list[range]:
        """For each axis of a tensor, the axes of `expert_shape` that are flattened into it."""
        axes = range(len(self.expert_shape))
        if self.input_axes is None:
            return [axes[axis : axis + 1] for axis in axes]
        if self.input_axes == 0:
            return [axes]
        return [axes[self.input_axes :], axes[: self.input_axes]]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        shape = self.expert_shape
        return tuple(math.prod(shape[axis] for axis in axes) for axes in self.flattened_axes)


def unstacked_parameters(
    config: ModelConfig, present: Collection[str] = ()
) -> list[UnstackedParameter]:
    """All parameters of a model, layer by layer, in the order in which checkpoints store them.

    Args:
      present: names of the tensors of a checkpoint to read, where gates may have an older name.
    """
    top, mappings = top_parameters(config), LAYERS | _gate_mappings(config, present)
    if config.attention_output_norm:
        mappings |= SANDWICH if config.input_norms else POST_NORM
    parameters = [_unstacked(("embedding",), None, top["embedding"].shape, TOP["embedding"])]
    before = 0
    for name, stack in stacks_of(config).items():
        layer = block_parameters(config, stack)
        parameters += [
            _unstacked((name, leaf), index, declared.shape, mappings[leaf], before + index)
            for index in range(stack.layers)
            for leaf, declared in layer.items()
        ]
        before += stack.layers
    return parameters + [
        _unstacked((name,), None, top[name].shape, TOP[name])
        for name in TOP
        if name in top and name != "embedding"
    ]


def _gate_mappings(config: ModelConfig, present: Collection[str]) -> dict[str, TensorMapping]:
    known = GATE_PREFIXES.get(config.loop.scheme)
    if known is None:
        return {}
    prefix = next((p for p in known if p.format(layer=0) + ".weight" in present), known[0])
    return {
        "gate_weight": TensorMapping(
            f"{prefix}.weight", 1 if config.loop.gate_input == "hidden" else None
        ),
        "gate_bias": TensorMapping(f"{prefix}.bias"),
        "gate_norm": TensorMapping(f"{prefix}.gate_norm.weight"),
    }


def _unstacked(
    path: tuple[str, ...],
    layer: int | None,
    shape: tuple[int, ...],
    mapping: TensorMapping,
    number: int | None = None,
) -> UnstackedParameter:
    """A parameter of a model; `number` is its layer's index in the whole model, and `layer` the
    layer's index in its stack."""
    by_expert = "{expert}" in mapping.name
    names = tuple(
        mapping.name.format(layer=number, expert=expert)
        for expert in range(shape[0] if by_expert else 1)
    )
    return UnstackedParameter(path, layer, shape, names, mapping.input_axes, by_expert)
