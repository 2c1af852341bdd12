"""The Hugging Face model types that are supported, and the choice of one for a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Literal, NamedTuple

from plt_jax.config import ModelConfig
from plt_jax.config.model import SchemeName
from plt_jax.errors import InputError


class Norms(NamedTuple):
    """The fields of ModelConfig that say which norms a layer has."""

    input_norms: bool = True
    attention_output_norm: bool = False
    ffn_output_norm: bool = False
    qk_norm: bool = False
    qk_norm_over: Literal["head", "all_heads"] = "head"


class ModelType(NamedTuple):
    """A Hugging Face model type, and what its name alone says about the model."""

    architecture: str
    rope_theta: float
    """The value where config.json has none."""
    norm_epsilon: float
    """The value where config.json has none."""
    scheme: SchemeName = "no_loop"
    loop_keys: tuple[str, ...] = ()
    """The keys of its config.json that say how the model loops."""
    norms: Norms = Norms()
    qkv_bias: bool | None = None
    """Whether queries, keys and values have biases; None where attention_bias says it."""
    output_bias: bool = True
    """Whether attention_bias adds a bias to attention's output, too."""
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
_NANBEIGE_KEYS = (
    *("num_loops", "loop_loss_weights", "skip_loop_final_norm"),
    # Only their values that change nothing are supported.
    *("enable_double_loop_split", "loop_middle_layers", "loop_share_kv"),
)
_OURO_KEYS = ("total_ut_steps", "early_exit_threshold")

_PER_HEAD = Norms(qk_norm=True)
_POST_NORM = Norms(
    input_norms=False,
    attention_output_norm=True,
    ffn_output_norm=True,
    qk_norm=True,
    qk_norm_over="all_heads",
)
_SANDWICH = Norms(attention_output_norm=True, ffn_output_norm=True)

MODEL_TYPES = {
    "llama": ModelType("LlamaForCausalLM", 10000.0, 1e-6),
    "mistral": ModelType("MistralForCausalLM", 10000.0, 1e-6),
    "qwen2": ModelType("Qwen2ForCausalLM", 10000.0, 1e-6, qkv_bias=True, output_bias=False),
    "qwen3": ModelType("Qwen3ForCausalLM", 10000.0, 1e-6, norms=_PER_HEAD),
    "olmo2": ModelType("Olmo2ForCausalLM", 10000.0, 1e-5, norms=_POST_NORM),
    "iquestcoder": ModelType("IQuestCoderForCausalLM", 500000.0, 1e-5),
    "nanbeige": ModelType("NanbeigeForCausalLM", 10000.0, 1e-6, "vanilla_loop", _NANBEIGE_KEYS),
    "ouro": ModelType(
        *("OuroForCausalLM", 10000.0, 1e-6, "vanilla_loop", _OURO_KEYS),
        norms=_SANDWICH,
        qkv_bias=False,
        output_bias=False,
    ),
    "iquestpltcoder": ModelType(
        "IQuestPLTCoderForCausalLM", 500000.0, 1e-5, "plt", _PLT_KEYS, allows_extra_keys=True
    ),
    "iquestloopcoder": ModelType(
        *("IQuestLoopCoderForCausalLM", 500000.0, 1e-5, "loop_kv_share_window", _LOOP_KEYS),
        allows_extra_keys=True,
    ),
    "iquest_moe": ModelType(
        *("IquestMoeV12ForCausalLM", 500000.0, 1e-5, "plt", _PLT_KEYS),
        norms=_PER_HEAD,
        output_bias=False,
        moe=True,
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
    name = _closest_type(config)
    if name is None:
        experts = " with experts" if config.moe.experts else ""
        raise InputError(
            f"model.loop.scheme {config.loop.scheme}{experts} has no Hugging Face model type; "
            "those that have are no_loop, vanilla_loop, plt and loop_kv_share_window, with experts "
            "only no_loop and plt"
        )
    kind, moe, loop = MODEL_TYPES[name], bool(config.moe.experts), config.loop
    # The looped types of IQuest have a key of our own for norms and biases.
    free = EXTRA_KEYS if kind.allows_extra_keys else ()
    needed = kind.norms._asdict()
    if not config.qk_norm:
        del needed["qk_norm_over"]  # which is not used
    biases = config.qkv_bias, config.output_bias
    whole = config.looped_layers == range(config.layers)
    differing = [name for name, value in needed.items() if getattr(config, name) != value]
    inexpressible = [
        *((field, field not in free) for field in differing),
        ("qkv_bias", config.qkv_bias and kind.qkv_bias is False),
        ("qkv_bias", biases == (True, False) and kind.output_bias and "qkv_bias" not in free),
        ("output_bias", config.output_bias and not (config.qkv_bias and kind.output_bias)),
        ("loop.first_layer", not whole and loop.first_layer > 0),
        ("loop.last_layer", not whole),
        ("loop.learned_hidden_scale", loop.learned_hidden_scale),
        ("residual_scale", config.residual_scale != 1.0),
        ("loop.exit_gate", loop.exit_gate != (name == "ouro")),
        ("loop.normalize_between_loops", name == "ouro" and not loop.normalize_between_loops),
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


def _closest_type(config: ModelConfig) -> str | None:
    """The model type that a configuration has most in common with; None if none has its loops."""
    scheme = config.loop.scheme
    if config.moe.experts:
        # A model without loops is one with one loop, and without gates.
        return "iquest_moe" if scheme in ("no_loop", "plt") else None
    if scheme == "no_loop":
        if not config.input_norms:
            return "olmo2"
        if config.qk_norm:
            return "qwen3"
        return "qwen2" if config.qkv_bias and not config.output_bias else "llama"
    if scheme == "vanilla_loop":
        return "ouro" if config.loop.exit_gate or config.attention_output_norm else "nanbeige"
    return {"plt": "iquestpltcoder", "loop_kv_share_window": "iquestloopcoder"}.get(scheme)


def _weights_sum_to_one(config: ModelConfig) -> bool:
    """Whether the chosen experts' weights sum to 1. Both routing orders are then the same model."""
    return config.moe.routing == "topk_then_softmax" or config.moe.renormalize
