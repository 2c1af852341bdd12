"""Hugging Face's config.json to ModelConfig."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pydantic

from plt_jax.config import ModelConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.errors import InputError
from plt_jax.interop.config_json import LLAMA3_FIELDS, ConfigJson, Rope, check_supported
from plt_jax.interop.model_types import EXTRA_KEYS, MODEL_TYPES, ModelType, find_model_type
from plt_jax.interop.tensors import is_gate


def read_config(
    values: Mapping[str, Any], tensors: Collection[str] = ()
) -> tuple[str, ModelConfig]:
    """The model type of a config.json, and its model, whose `max_length` is its longest context.

    Args:
      tensors: names of the checkpoint's tensors. A looped model type with one loop needs no gates.
        If the checkpoint has none, the scheme is no_loop.

    Raises:
      InputError: the model type is unknown, a key is missing, or the model does not support a
        value.
    """
    try:
        keys = ConfigJson.model_validate({k: v for k, v in values.items() if v is not None})
        name = find_model_type(keys.model_type, keys.architectures or [])
        check_supported(values, keys, name)
        return name, ModelConfig.model_validate(_read_fields(keys, name, tensors))
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error)) from error


def _read_fields(keys: ConfigJson, name: str, tensors: Collection[str]) -> dict[str, Any]:
    """The fields of ModelConfig."""
    model_type, bias = MODEL_TYPES[name], bool(keys.attention_bias)
    if bias and model_type.qkv_bias is False:
        raise InputError(f"attention_bias is true, but model_type {name} has no biases")
    fields = {
        "vocab_size": keys.vocab_size,
        "max_length": keys.max_position_embeddings,
        "width": keys.hidden_size,
        "layers": keys.num_hidden_layers,
        "heads": keys.num_attention_heads,
        "kv_heads": _or_default(keys.num_key_value_heads, keys.num_attention_heads),
        "head_width": _or_default(keys.head_dim, keys.kv_channels if name == "nanbeige" else None),
        "norm_epsilon": _or_default(keys.rms_norm_eps, model_type.norm_epsilon),
        "tied_embeddings": bool(keys.tie_word_embeddings),
        **model_type.norms._asdict(),
        "qkv_bias": _or_default(model_type.qkv_bias, bias),
        "output_bias": bias and model_type.output_bias,
        "loop": _read_loop(keys, name, tensors),
        **_read_rope(keys, model_type),
    }
    if model_type.allows_extra_keys:
        fields |= {key: True for key in EXTRA_KEYS if getattr(keys, key)}
    if model_type.moe:
        fields["moe"] = _read_moe(keys)
    if not model_type.moe or keys.intermediate_size is not None or keys.mlp_only_layers:
        fields["ffn_width"] = _required(keys, "intermediate_size")
    return fields


def _read_rope(keys: ConfigJson, model_type: ModelType) -> dict[str, Any]:
    """The fields rope_theta and rope_scaling."""
    # Where both sections stand, transformers 5 reads rope_scaling, unless it is empty.
    sections = (keys.rope_scaling, keys.rope_parameters)
    given = [one for one in sections if one is not None and one.model_dump(exclude_none=True)]
    rope = given[0] if given else Rope()
    theta = _or_default(rope.rope_theta, _or_default(keys.rope_theta, model_type.rope_theta))
    if keys.rope_parameters is not None and rope.rope_theta is None:
        theta = _or_default(keys.rope_parameters.rope_theta, theta)
    kind = _or_default(rope.rope_type, _or_default(rope.type, "default"))
    if kind == "default":
        if rope.factor is not None:
            raise InputError("rope_scaling has a factor, but no rope_type to say what it scales")
        return {"rope_theta": theta}
    needed = {"linear": ("factor",), "llama3": tuple(LLAMA3_FIELDS)}.get(kind)
    if needed is None:
        raise InputError(
            f"rope_scaling of type {kind!r} is not supported; known: default, linear, llama3"
        )
    missing = [key for key in needed if getattr(rope, key) is None]
    if missing:
        raise InputError(f"rope_scaling of type {kind} lacks {missing[0]}")
    fields = {LLAMA3_FIELDS[key]: getattr(rope, key) for key in needed}
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **fields}}


def _read_loop(keys: ConfigJson, name: str, tensors: Collection[str]) -> dict[str, Any]:
    scheme = MODEL_TYPES[name].scheme
    if scheme == "no_loop":
        return {"scheme": scheme}
    if name == "nanbeige":
        weights = keys.loop_loss_weights or []  # one for each loop but the last
        return {
            "scheme": scheme,
            "count": len(weights) + 1 if weights else _or_default(keys.num_loops, 1),
            "normalize_between_loops": not keys.skip_loop_final_norm,
        }
    if name == "ouro":
        return {
            "scheme": scheme,
            "count": _or_default(keys.total_ut_steps, 4),
            "exit_gate": True,
            "exit_threshold": _or_default(keys.early_exit_threshold, 1.0),
        }
    if scheme == "loop_kv_share_window":
        return {
            "scheme": scheme,
            "count": _or_default(keys.loop_num, 2),
            "window": _or_default(keys.loop_window_size, 64),
            "gate_input": "query",
            "normalize_between_loops": False,
        }
    count = _or_default(keys.plt_num_loops, 2)
    if count == 1 and tensors and not any(map(is_gate, tensors)):
        return {"scheme": "no_loop"}
    window = _or_default(keys.plt_window_size, [64, 0])
    if len(window) != 2 or window[1] != 0:
        raise InputError(
            f"plt_window_size is {window}; it must be [n, 0]: n keys to the left of the current one"
        )
    return {
        "scheme": scheme,
        "count": count,
        "window": window[0] + 1,  # our window counts the current key, too
        "gate_input": "hidden" if keys.plt_gate_use_hidden_states else "query",
        "embedding_scale": _or_default(keys.plt_emb_scale, 1.0),
        "hidden_scale": _or_default(keys.plt_hidden_scale, 1.0),
        "normalize_between_loops": _or_default(keys.plt_normalize_per_loop, True),
    }


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
        # The softmax is over the chosen experts alone, so norm_topk_prob changes nothing.
        "routing": "topk_then_softmax",
        "shared_width": shared,
        "shared_gate": bool(shared and keys.use_shared_expert_gate),
        "load_balance_loss": _or_default(keys.router_aux_loss_coef, 0.01),
    }


def _required(keys: ConfigJson, key: str) -> Any:
    value = getattr(keys, key)
    if value is None:
        raise InputError(f"{key} is missing")
    return value


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value
