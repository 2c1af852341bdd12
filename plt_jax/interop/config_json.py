"""Hugging Face's config.json to ModelConfig and back.

A key that would change the arithmetic in a way the model does not have is refused by name, never
dropped: a checkpoint run by the wrong rules writes fluent, wrong text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from plt_jax.config import ModelConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.errors import InputError
from plt_jax.interop.model_types import (
    EXTENSIONS,
    MODEL_TYPES,
    ModelType,
    find_model_type,
    model_type_of,
)
from plt_jax.interop.tensors import is_gate


class Keys(pydantic.BaseModel):
    """Base of what is read; null is as good as absent, and types are strict: a value of another
    type means something that is not known here."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class Rope(Keys):
    """What rope_scaling (transformers 4) or rope_parameters (transformers 5) may hold."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float | None = None
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None


class ConfigJson(Keys):
    """The keys of a config.json that say what the model computes."""

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat | None = None
    rope_theta: PositiveFloat | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    qk_norm: bool | None = None
    qkv_bias: bool | None = None
    ffn_output_norm: bool | None = None
    loop_num: PositiveInt | None = None
    loop_window_size: PositiveInt | None = None
    plt_num_loops: PositiveInt | None = None
    plt_window_size: list[NonNegativeInt] | None = None
    plt_normalize_per_loop: bool | None = None
    plt_emb_scale: float | None = None
    plt_hidden_scale: float | None = None
    plt_gate_use_hidden_states: bool | None = None
    num_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    shared_expert_intermediate_size: NonNegativeInt | None = None
    use_shared_expert_gate: bool | None = None
    router_aux_loss_coef: float | None = None
    mlp_only_layers: list[NonNegativeInt] | None = None


MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "clip_qkv": (),
    "partial_rotary_factor": (1.0,),
    "decoder_sparse_step": (1,),
    "dual_chunk_attention_config": (),
    "first_k_dense_replace": (0,),
    "scoring_func": ("softmax",),
    "routed_scaling_factor": (1.0,),
    "n_group": (1,),
    "topk_group": (1,),
}
"""Values besides null that the model can honour, for keys that would change it."""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping, not a {type(values).__name__}")
    return values


def read_config(
    values: Mapping[str, Any], tensors: Collection[str] = ()
) -> tuple[str, ModelConfig]:
    """The model type of a config.json and its model; `max_length` is its longest context.

    Args:
      tensors: names in the checkpoint. A looped type of one loop needs no gates and may have none:
        without them it is read as no_loop.

    Raises:
      InputError: an unknown model type, a missing key, or a value that the model cannot honour.
    """
    try:
        keys = ConfigJson.model_validate({k: v for k, v in values.items() if v is not None})
        name = find_model_type(keys.model_type, keys.architectures or [])
        _check_honoured(values, keys, name)
        return name, ModelConfig.model_validate(_read_fields(keys, name, tensors))
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error)) from error


def _read_fields(keys: ConfigJson, name: str, tensors: Collection[str]) -> dict[str, Any]:
    """The fields of ModelConfig."""
    kind, heads, bias = MODEL_TYPES[name], keys.num_attention_heads, bool(keys.attention_bias)
    fields = {
        "vocab_size": keys.vocab_size,
        "max_length": keys.max_position_embeddings,
        "width": keys.hidden_size,
        "layers": keys.num_hidden_layers,
        "heads": heads,
        "kv_heads": _given(keys.num_key_value_heads, heads),
        "head_width": keys.head_dim,
        "norm_epsilon": _given(keys.rms_norm_eps, kind.norm_epsilon),
        "tied_embeddings": bool(keys.tie_word_embeddings),
        "qk_norm": kind.qk_norm,
        "qkv_bias": bias or name == "qwen2",
        "output_bias": bias and name not in ("qwen2", "iquest_moe"),
        "loop": _read_loop(keys, name, tensors),
        **_read_rope(keys, kind),
    }
    if kind.extends:
        fields |= {key: True for key in EXTENSIONS if getattr(keys, key)}
    if kind.moe:
        fields["moe"] = _read_moe(keys)
    if not kind.moe or keys.intermediate_size is not None or keys.mlp_only_layers:
        fields["ffn_width"] = _required(keys, "intermediate_size")
    return fields


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


def _check_honoured(values: Mapping[str, Any], keys: ConfigJson, name: str) -> None:
    """Raises InputError for what the model does not have."""
    for key, value in values.items():
        looping = key.startswith(("plt_", "loop_")) and key not in MODEL_TYPES[name].loop_keys
        if looping and value is not None:
            raise InputError(
                f"{key} is {value!r}, which says how a model loops, but model_type {name} does not "
                "read it; set the model_type that the weights were trained as"
            )
    for key, allowed in MUST_BE.items():
        if values.get(key) is not None and values[key] not in allowed:
            known = ", ".join([*map(str, allowed), "none"])
            raise InputError(f"{key} is {values[key]!r}, which is not supported; known: {known}")
    if keys.mlp_only_layers and not MODEL_TYPES[name].moe:
        raise InputError(
            f"mlp_only_layers is {keys.mlp_only_layers!r}, which is not supported without experts"
        )
    other = [kind for kind in keys.layer_types or [] if kind != "full_attention"]
    if other:
        raise InputError(f"layer_types holds {other[0]!r}; only full_attention is supported")
    # Qwen's files name a window that use_sliding_window leaves unused.
    if keys.sliding_window is not None and keys.use_sliding_window is None:
        raise InputError(
            f"sliding_window is {keys.sliding_window}, which is not supported; known: none"
        )
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            raise InputError(f"{key} is set apart for {nested[0]}, which is not supported")
        if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise InputError(
                f"partial_rotary_factor is {rope['partial_rotary_factor']}, which is not "
                "supported; known: 1.0, none"
            )


def _read_rope(keys: ConfigJson, kind: ModelType) -> dict[str, Any]:
    """The fields rope_theta and rope_scaling."""
    rope = keys.rope_scaling or keys.rope_parameters or Rope()  # as transformers 5 reads them
    theta = _given(rope.rope_theta, _given(keys.rope_theta, kind.rope_theta))
    if keys.rope_parameters is not None and rope.rope_theta is None:
        theta = _given(keys.rope_parameters.rope_theta, theta)
    scaling = _given(rope.rope_type, _given(rope.type, "default"))
    if scaling == "default":
        if rope.factor is not None:
            raise InputError("rope_scaling has a factor, but no rope_type to say what it scales")
        return {"rope_theta": theta}
    names = {"linear": ("factor",), "llama3": tuple(LLAMA3_KEYS)}.get(scaling)
    if names is None:
        raise InputError(
            f"rope_scaling of type {scaling!r} is not supported; known: default, linear, llama3"
        )
    missing = [name for name in names if getattr(rope, name) is None]
    if missing:
        raise InputError(f"rope_scaling of type {scaling} lacks {missing[0]}")
    fields = {LLAMA3_KEYS[name]: getattr(rope, name) for name in names}
    return {"rope_theta": theta, "rope_scaling": {"kind": scaling, **fields}}


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


def _read_loop(keys: ConfigJson, name: str, tensors: Collection[str]) -> dict[str, Any]:
    scheme = MODEL_TYPES[name].scheme
    if scheme == "no_loop":
        return {"scheme": scheme}
    if scheme == "loop_kv_share_window":
        return {
            "scheme": scheme,
            "count": _given(keys.loop_num, 2),
            "window": _given(keys.loop_window_size, 64),
            "gate_input": "query",
            "normalize_between_loops": False,
        }
    count = _given(keys.plt_num_loops, 2)
    if count == 1 and tensors and not any(map(is_gate, tensors)):
        return {"scheme": "no_loop"}
    window = _given(keys.plt_window_size, [64, 0])
    if len(window) != 2 or window[1] != 0:
        raise InputError(
            f"plt_window_size is {window}; it must be [n, 0], n keys to the left besides itself"
        )
    return {
        "scheme": scheme,
        "count": count,
        "window": window[0] + 1,
        "gate_input": "hidden" if keys.plt_gate_use_hidden_states else "query",
        "embedding_scale": _given(keys.plt_emb_scale, 1.0),
        "hidden_scale": _given(keys.plt_hidden_scale, 1.0),
        "normalize_between_loops": _given(keys.plt_normalize_per_loop, True),
    }


def _write_loop(config: ModelConfig, name: str) -> dict[str, Any]:
    loop = config.loop
    if loop.scheme == "no_loop":
        return {"plt_num_loops": 1} if MODEL_TYPES[name].scheme == "plt" else {}
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


def _read_moe(keys: ConfigJson) -> dict[str, Any]:
    shared, dense = keys.shared_expert_intermediate_size or 0, keys.mlp_only_layers or []
    if dense != list(range(len(dense))):
        raise InputError(
            f"mlp_only_layers is {dense}, which is not supported; known: leading layers, in order"
        )
    return {
        "dense_layers": len(dense),
        "experts": _required(keys, "num_experts"),
        "experts_per_token": _required(keys, "num_experts_per_tok"),
        "expert_width": _required(keys, "moe_intermediate_size"),
        # Over the chosen experts alone, so that norm_topk_prob changes nothing.
        "routing": "topk_then_softmax",
        "shared_width": shared,
        "shared_gate": bool(shared and keys.use_shared_expert_gate),
        "load_balance_loss": _given(keys.router_aux_loss_coef, 0.01),
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
        "mlp_only_layers": list(range(moe.dense_layers)),
        "router_aux_loss_coef": moe.load_balance_loss,
    }


def _required(keys: ConfigJson, key: str) -> Any:
    value = getattr(keys, key)
    if value is None:
        raise InputError(f"{key} is missing")
    return value


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
