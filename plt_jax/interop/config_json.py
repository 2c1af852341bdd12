"""Hugging Face's config.json to ModelConfig and back.

A key that would change the arithmetic in a way the model does not have is refused by name, never
dropped: a checkpoint run by the wrong rules writes fluent, wrong text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pydantic

from plt_jax.config import ModelConfig
from plt_jax.config_file import describe_errors
from plt_jax.errors import InputError


class ModelType(NamedTuple):
    """A model type of Hugging Face, and what its name alone says about the model."""

    architecture: str
    rope_theta: float
    """Where config.json has none; so too the epsilon."""
    norm_epsilon: float
    scheme: str = "no_loop"
    qk_norm: bool = False
    moe: bool = False
    extends: bool = False
    """Whether our extra keys (EXTENSIONS) may stand in its config.json: runtimes of the looped
    types stop at tensors that they do not know, those of the others pass over them."""


MODEL_TYPES = {
    "llama": ModelType("LlamaForCausalLM", 10000.0, 1e-6),
    "qwen2": ModelType("Qwen2ForCausalLM", 10000.0, 1e-6),
    "qwen3": ModelType("Qwen3ForCausalLM", 10000.0, 1e-6, qk_norm=True),
    "iquestpltcoder": ModelType(
        "IQuestPLTCoderForCausalLM", 500000.0, 1e-5, scheme="plt", extends=True
    ),
    "iquestloopcoder": ModelType(
        "IQuestLoopCoderForCausalLM", 500000.0, 1e-5, scheme="loop_kv_share_window", extends=True
    ),
    "iquest_moe": ModelType(
        "IquestMoeV12ForCausalLM", 500000.0, 1e-5, scheme="plt", qk_norm=True, moe=True
    ),
}

EXTENSIONS = ("qk_norm", "qkv_bias", "ffn_output_norm")
"""Options that the looped dense types have no key for; written where they are on."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "clip_qkv": (),
    "partial_rotary_factor": (1.0,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "dual_chunk_attention_config": (),
}
"""Values besides null that the model can honour, for keys that would change it."""


def model_type(values: Mapping[str, Any]) -> str:
    """The model type of a config.json, by its model_type or its architectures.

    Raises:
      InputError: both are unknown, or they disagree.
    """
    declared = values.get("model_type")
    architectures = values.get("architectures") or []
    by_architecture = {kind.architecture: name for name, kind in MODEL_TYPES.items()}
    implied = [by_architecture[name] for name in architectures if name in by_architecture]
    if declared in MODEL_TYPES and implied and declared != implied[0]:
        raise InputError(
            f"model_type {declared} and architectures {architectures} are two kinds of model; set "
            f"the one that the weights have ({declared} or {implied[0]})"
        )
    name = declared if declared in MODEL_TYPES else next(iter(implied), None)
    if name is None:
        raise InputError(
            f"unknown model_type {declared!r} (architectures {architectures}); known: "
            f"{', '.join(MODEL_TYPES)}"
        )
    return name


def read_config(values: Mapping[str, Any], tensors: Collection[str] = ()) -> ModelConfig:
    """The model that a config.json describes; `max_length` is its longest context.

    Args:
      tensors: names in the checkpoint. A looped type of one loop needs no gates and may have none:
        without them it is read as no_loop.

    Raises:
      InputError: an unknown model type, a missing key, or a value that the model cannot honour.
    """
    name = model_type(values)
    kind = MODEL_TYPES[name]
    for key, allowed in MUST_BE.items():
        if values.get(key) is not None and values[key] not in allowed:
            known = ", ".join([*map(str, allowed), "none"])
            raise InputError(f"{key} is {values[key]!r}, which is not supported; known: {known}")
    _check_full_attention(values)
    theta, rope_scaling = _read_rope(values, kind)
    heads = _required(values, "num_attention_heads")
    bias = bool(values.get("attention_bias"))
    fields = {
        "vocab_size": _required(values, "vocab_size"),
        "max_length": _required(values, "max_position_embeddings"),
        "width": _required(values, "hidden_size"),
        "layers": _required(values, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": _given(values, "num_key_value_heads", heads),
        "head_width": values.get("head_dim"),
        "rope_theta": theta,
        "rope_scaling": rope_scaling,
        "norm_epsilon": _given(values, "rms_norm_eps", kind.norm_epsilon),
        "tied_embeddings": _given(values, "tie_word_embeddings", False),
        "qk_norm": kind.qk_norm,
        "qkv_bias": bias or name == "qwen2",
        "output_bias": bias and name not in ("qwen2", "iquest_moe"),
        "loop": _read_loop(values, name, tensors),
    }
    if kind.extends:
        fields |= {key: values[key] for key in EXTENSIONS if key in values}
    if kind.moe:
        fields["moe"] = _read_moe(values)
    if not kind.moe or "intermediate_size" in values:
        fields["ffn_width"] = _required(values, "intermediate_size")
    try:
        return ModelConfig.model_validate(fields)
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error)) from error


def write_config(config: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model.

    Args:
      dtype: of the weights, as numpy names it.
      token_ids: bos_token_id and the like, taken over as they are.

    Raises:
      InputError: no public model type can say what the configuration says; names the field.
    """
    name = model_type_of(config)
    kind = MODEL_TYPES[name]
    values = {
        "architectures": [kind.architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_rope_scaling(config),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.qkv_bias and (config.output_bias or kind.moe),
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": dtype,
        "use_cache": True,
        **token_ids,
    }
    if kind.extends:
        extra = {key: getattr(config, key) for key in EXTENSIONS}
        extra["qkv_bias"] = config.qkv_bias and not config.output_bias
        values |= {key: True for key, on in extra.items() if on}
    if kind.moe:
        values |= _write_moe(config)
    return values | _write_loop(config, name)


def model_type_of(config: ModelConfig) -> str:
    """The model type that can hold a configuration.

    Raises:
      InputError: none can; names the field.
    """
    moe, scheme = bool(config.moe.experts), config.loop.scheme
    if scheme == "no_loop":
        name = "qwen3" if config.qk_norm else "llama"
        if config.qkv_bias and not config.output_bias and not config.qk_norm:
            name = "qwen2"
    else:
        types = [n for n, kind in MODEL_TYPES.items() if kind.scheme == scheme and kind.moe == moe]
        name = types[0] if types else None
    if name is None or MODEL_TYPES[name].moe != moe:
        experts = " with experts" if moe else ""
        raise InputError(
            f"model.loop.scheme {scheme}{experts} has no Hugging Face model type; those that have "
            "are no_loop, plt and loop_kv_share_window, and with experts plt"
        )
    kind = MODEL_TYPES[name]
    unsaid = [
        ("ffn_output_norm", config.ffn_output_norm and not kind.extends),
        ("qk_norm", config.qk_norm != kind.qk_norm and not kind.extends),
        ("qkv_bias", config.qkv_bias and not config.output_bias and name in ("llama", "qwen3")),
        ("output_bias", config.output_bias and (not config.qkv_bias or kind.moe)),
        ("moe.renormalize", moe and not _renormalised(config)),
    ]
    for field, is_unsaid in unsaid:
        if is_unsaid:
            value = config.moe.renormalize if "." in field else getattr(config, field)
            raise InputError(
                f"model.{field} is {value}, which Hugging Face's model type {name} cannot say, so "
                "the model cannot be exported"
            )
    return name


def _check_full_attention(values: Mapping[str, Any]) -> None:
    other = [kind for kind in values.get("layer_types") or [] if kind != "full_attention"]
    if other:
        raise InputError(f"layer_types holds {other[0]!r}; only full_attention is supported")
    # Qwen's files name a window that use_sliding_window leaves unused.
    if values.get("sliding_window") is not None and "use_sliding_window" not in values:
        raise InputError(
            f"sliding_window is {values['sliding_window']!r}, which is not supported; known: none"
        )


def _read_rope(values: Mapping[str, Any], kind: ModelType) -> tuple[Any, dict[str, Any]]:
    """The base of RoPE's frequencies, and our section rope_scaling."""
    # transformers 5 writes all of it as rope_parameters, transformers 4 apart.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"rope_scaling is {rope!r}, not a mapping")
    theta = rope.get("rope_theta", _given(values, "rope_theta", kind.rope_theta))
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling == "default":
        return theta, {}
    names = {"linear": ("factor",), "llama3": tuple(LLAMA3_KEYS)}.get(scaling)
    if names is None:
        raise InputError(
            f"rope_scaling of type {scaling!r} is not supported; known: default, linear, llama3"
        )
    missing = [name for name in names if name not in rope]
    if missing:
        raise InputError(f"rope_scaling of type {scaling} lacks {missing[0]}")
    return theta, {"kind": scaling} | {LLAMA3_KEYS[name]: rope[name] for name in names}


LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}
"""Keys of rope_scaling, and the fields of RopeScalingConfig."""


def _write_rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return None
    keys = LLAMA3_KEYS if scaling.kind == "llama3" else {"factor": "factor"}
    return {"rope_type": scaling.kind} | {
        key: getattr(scaling, field) for key, field in keys.items()
    }


def _read_loop(values: Mapping[str, Any], name: str, tensors: Collection[str]) -> dict[str, Any]:
    scheme = MODEL_TYPES[name].scheme
    if scheme == "no_loop":
        return {"scheme": scheme}
    if scheme == "loop_kv_share_window":
        return {
            "scheme": scheme,
            "count": _given(values, "loop_num", 2),
            "window": _given(values, "loop_window_size", 64),
            "gate_input": "query",
            "normalize_between_loops": False,
        }
    count = _given(values, "plt_num_loops", 2)
    if count == 1 and tensors and not any("gate_norm" in t or "gate.bias" in t for t in tensors):
        return {"scheme": "no_loop"}
    window = _given(values, "plt_window_size", [64, 0])
    if not (isinstance(window, list) and len(window) == 2 and window[0] >= 0 == window[1]):
        raise InputError(
            f"plt_window_size is {window!r}; it must be [n, 0], n keys to the left besides itself"
        )
    return {
        "scheme": scheme,
        "count": count,
        "window": window[0] + 1,
        "gate_input": "hidden" if values.get("plt_gate_use_hidden_states") else "query",
        "embedding_scale": _given(values, "plt_emb_scale", 1.0),
        "hidden_scale": _given(values, "plt_hidden_scale", 1.0),
        "normalize_between_loops": _given(values, "plt_normalize_per_loop", True),
    }


def _write_loop(config: ModelConfig, name: str) -> dict[str, Any]:
    loop = config.loop
    if loop.scheme == "no_loop":
        return {}
    if loop.scheme == "plt":
        return {
            "plt_num_loops": loop.count,
            "plt_window_size": [loop.window - 1, 0],
            "plt_normalize_per_loop": loop.normalize_between_loops,
            "plt_emb_scale": loop.embedding_scale,
            "plt_hidden_scale": loop.hidden_scale,
            "plt_gate_use_hidden_states": loop.gate_input == "hidden",
        }
    for field, needed in (("gate_input", "query"), ("normalize_between_loops", False)):
        if getattr(loop, field) != needed:
            raise InputError(
                f"model.loop.{field} is {getattr(loop, field)}, which Hugging Face's model type "
                f"{name} cannot say, so the model cannot be exported"
            )
    return {"loop_num": loop.count, "loop_window_size": loop.window}


def _read_moe(values: Mapping[str, Any]) -> dict[str, Any]:
    shared = _given(values, "shared_expert_intermediate_size", 0)
    return {
        "experts": _required(values, "num_experts"),
        "experts_per_token": _required(values, "num_experts_per_tok"),
        "expert_width": _required(values, "moe_intermediate_size"),
        # Over the chosen experts alone, so that norm_topk_prob changes nothing.
        "routing": "topk_then_softmax",
        "shared_width": shared,
        "shared_gate": bool(shared and values.get("use_shared_expert_gate")),
        "load_balance_loss": _given(values, "router_aux_loss_coef", 0.01),
    }


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_width,
        "shared_expert_intermediate_size": moe.shared_width,
        "use_shared_expert_gate": moe.shared_gate,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": moe.load_balance_loss,
    }


def _renormalised(config: ModelConfig) -> bool:
    """Whether the chosen experts' weights sum to 1: then both routing orders are the same."""
    return config.moe.routing == "topk_then_softmax" or config.moe.renormalize


def _required(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise InputError(f"{key} is missing")
    return values[key]


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if values.get(key) is None else values[key]
