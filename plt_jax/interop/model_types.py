"""The Hugging Face model types that are supported, and the choice of one for a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from plt_jax.config import ModelConfig
from plt_jax.errors import InputError


class ModelType(NamedTuple):
    """A Hugging Face model type, and what its name alone says about the model."""

    architecture: str
    rope_theta: float
    """The value where config.json has none."""
    norm_epsilon: float
    """The value where config.json has none."""
    scheme: str = "no_loop"
    loop_keys: tuple[str, ...] = ()
    """The keys of its config.json that begin with plt_ or loop_."""
    qk_norm: bool = False
    moe: bool = False
    allows_extra_keys: bool = False
    """Whether its config.json may hold EXTRA_KEYS. Runtimes of the looped types refuse tensors that
    they do not know, so the model cannot run wrongly there. Other runtimes ignore such tensors."""


_LOOP_KEYS = ("loop_num", "loop_window_size")
_PLT_KEYS = (
    "plt_num_loops",
    "plt_window_size",
    "plt_normalize_per_loop",
    "plt_emb_scale",
    "plt_hidden_scale",
    "plt_gate_use_hidden_states",
)

MODEL_TYPES = {
    "llama": ModelType("LlamaForCausalLM", 10000.0, 1e-6),
    "qwen2": ModelType("Qwen2ForCausalLM", 10000.0, 1e-6),
    "qwen3": ModelType("Qwen3ForCausalLM", 10000.0, 1e-6, qk_norm=True),
    "iquestpltcoder": ModelType(
        "IQuestPLTCoderForCausalLM", 500000.0, 1e-5, "plt", _PLT_KEYS, allows_extra_keys=True
    ),
    "iquestloopcoder": ModelType(
        *("IQuestLoopCoderForCausalLM", 500000.0, 1e-5, "loop_kv_share_window", _LOOP_KEYS),
        allows_extra_keys=True,
    ),
    "iquest_moe": ModelType(
        "IquestMoeV12ForCausalLM", 500000.0, 1e-5, "plt", _PLT_KEYS, qk_norm=True, moe=True
    ),
}

EXTRA_KEYS = ("qk_norm", "qkv_bias", "ffn_output_norm")
"""Options of ours that the looped dense types have no key for. They are written if they are on."""


def find_model_type(declared: str | None, architectures: Sequence[str]) -> str:
    """The model type of a config.json.

    Args:
      declared: its model_type.
      architectures: its architectures, which decide if it has no model_type.

    Raises:
      InputError: the model type is unknown, or the two disagree.
    """
    by_architecture = {kind.architecture: name for name, kind in MODEL_TYPES.items()}
    implied = next((by_architecture[a] for a in architectures if a in by_architecture), None)
    if declared in MODEL_TYPES:
        if implied not in (None, declared):
            raise InputError(
                f"model_type {declared} and architectures {architectures} are different models; "
                f"set the one that the weights have ({declared} or {implied})"
            )
        return declared
    # Public mixtures of experts have several model_types with one architecture. Any other unknown
    # model_type may differ from the model of its architecture.
    if implied is not None and (declared is None or MODEL_TYPES[implied].moe):
        return implied
    raise InputError(
        f"unknown model_type {declared!r} (architectures {architectures}); known: "
        f"{', '.join(MODEL_TYPES)}"
    )


def choose_model_type(config: ModelConfig) -> str:
    """The model type that can express a configuration.

    Raises:
      InputError: there is none; the message names the field.
    """
    moe, scheme = bool(config.moe.experts), config.loop.scheme
    if scheme == "no_loop" and moe:
        name = "iquest_moe"  # with one loop and without gates
    elif scheme == "no_loop":
        name = "qwen3" if config.qk_norm else "llama"
        if config.qkv_bias and not config.output_bias and not config.qk_norm:
            name = "qwen2"
    else:
        types = [n for n, kind in MODEL_TYPES.items() if kind.scheme == scheme and kind.moe == moe]
        name = next(iter(types), None)
    if name is None or MODEL_TYPES[name].moe != moe:
        experts = " with experts" if moe else ""
        raise InputError(
            f"model.loop.scheme {scheme}{experts} has no Hugging Face model type; those that have "
            "are no_loop, plt and loop_kv_share_window, with experts only the first two"
        )
    kind = MODEL_TYPES[name]
    inexpressible = [
        ("ffn_output_norm", config.ffn_output_norm and not kind.allows_extra_keys),
        ("qk_norm", config.qk_norm != kind.qk_norm and not kind.allows_extra_keys),
        ("qkv_bias", config.qkv_bias and not config.output_bias and name in ("llama", "qwen3")),
        ("output_bias", config.output_bias and (not config.qkv_bias or kind.moe)),
        ("moe.renormalize", moe and not _weights_sum_to_one(config)),
        ("moe.bias_update_rate", config.moe.bias_update_rate is not None),
    ]
    for field, cannot_express in inexpressible:
        if cannot_express:
            value = attrgetter(field)(config)
            raise InputError(
                f"model.{field} is {value}, which Hugging Face's model type {name} cannot express, "
                "so the model cannot be exported"
            )
    return name


def _weights_sum_to_one(config: ModelConfig) -> bool:
    """Whether the chosen experts' weights sum to 1. Both routing orders are then the same model."""
    return config.moe.routing == "topk_then_softmax" or config.moe.renormalize
