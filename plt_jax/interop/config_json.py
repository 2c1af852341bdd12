"""The keys of Hugging Face's config.json, and which of their values the model supports.

A key that asks for arithmetic that the model does not have is refused by name and never dropped,
because a checkpoint that runs by the wrong rules generates fluent, wrong text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from plt_jax.errors import InputError
from plt_jax.interop.model_types import MODEL_TYPES

CONFIG = "config.json"


class Keys(pydantic.BaseModel):
    """Base of the sections of a config.json.

    A null value counts as an absent key. Types are strict, because a value of another type has a
    meaning that is not known here.
    """

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class Rope(Keys):
    """The keys of rope_scaling (transformers 4) and rope_parameters (transformers 5)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float | None = None
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None


class ConfigJson(Keys):
    """The keys of a config.json that determine what the model computes."""

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    kv_channels: PositiveInt | None = None
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
    num_loops: PositiveInt | None = None
    loop_loss_weights: list[float] | None = None
    skip_loop_final_norm: bool | None = None
    total_ut_steps: PositiveInt | None = None
    early_exit_threshold: float | None = None
    num_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    shared_expert_intermediate_size: NonNegativeInt | None = None
    use_shared_expert_gate: bool | None = None
    router_aux_loss_coef: float | None = None
    mlp_only_layers: list[NonNegativeInt] | None = None


SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
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
    "early_exit_step": (),
    "emb_neighbor_num": (),
    "insert_ngram_layer_idx": ([],),
    "loop_middle_layers": (False, []),
    **dict.fromkeys(
        (
            *("qk_layernorm", "ngram_insert_all_layers", "enable_double_loop_split"),
            *("loop_share_kv", "enable_hyper_connection", "enable_mhc"),
            *("enable_h_res_identity", "enable_depth_attention"),
        ),
        (False,),
    ),
}
"""The values besides null that the model supports, by key. Any other value would change what the
model computes."""

MISTRAL_WINDOW = 4096
"""Mistral's sliding_window where config.json has no such key."""

LLAMA3_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}
"""The fields of RopeScalingConfig, by the keys of Rope."""


def check_supported(values: Mapping[str, Any], keys: ConfigJson, name: str) -> None:
    """Raises InputError if a config.json asks for something that the model does not have.

    Args:
      values: the whole config.json.
      keys: the same, validated.
      name: its model type.
    """
    _check_loop_keys(values, name)
    for key, allowed in SUPPORTED_VALUES.items():
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
    # Qwen's files give a window even where use_sliding_window says that it is unused.
    window = keys.sliding_window if keys.use_sliding_window is None else None
    if name == "mistral":
        # Where the key is absent, its runtime has a window. Only null says that there is none.
        window = values.get("sliding_window", MISTRAL_WINDOW)
    if window is not None and window < keys.max_position_embeddings:
        raise InputError(
            f"sliding_window is {window}, which is not supported; known: none, and windows of at "
            f"least max_position_embeddings, {keys.max_position_embeddings}"
        )
    _check_rope(values)


def _check_loop_keys(values: Mapping[str, Any], name: str) -> None:
    known = {key for kind in MODEL_TYPES.values() for key in kind.loop_keys}
    for key, value in values.items():
        loops = key in known or key.startswith(("plt_", "loop_"))
        unread = loops and key not in MODEL_TYPES[name].loop_keys
        if unread and value is not None:
            raise InputError(
                f"{key} is {value!r}, which says how a model loops, but model_type {name} does not "
                "read it; set the model_type that the weights were trained as"
            )


def _check_rope(values: Mapping[str, Any]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            raise InputError(f"{key} has values of its own for {nested[0]}, which is not supported")
        if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise InputError(
                f"partial_rotary_factor is {rope['partial_rotary_factor']}, which is not "
                "supported; known: 1.0, none"
            )
