"""ModelConfig to Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plt_jax.config import ModelConfig
from plt_jax.errors import InputError
from plt_jax.interop.config_json import LLAMA3_FIELDS
from plt_jax.interop.model_types import EXTRA_KEYS, MODEL_TYPES, choose_model_type


def write_config(config: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model.

    Args:
      dtype: numpy's name of the weights' dtype.
      token_ids: bos_token_id and the like, which are copied.

    Raises:
      InputError: no Hugging Face model type can express the configuration; the message names the
        field.
    """
    name = choose_model_type(config)
    model_type = MODEL_TYPES[name]
    values = {
        "architectures": [model_type.architecture],
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
        "attention_bias": config.qkv_bias and (config.output_bias or model_type.moe),
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": dtype,
        "use_cache": True,
        **token_ids,
    }
    if model_type.allows_extra_keys:
        extra = {key: getattr(config, key) for key in EXTRA_KEYS}
        extra["qkv_bias"] = config.qkv_bias and not config.output_bias
        values |= {key: True for key, on in extra.items() if on}
    if model_type.moe:
        values |= _write_moe(config)
    return values | _write_loop(config, name)


def _write_rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return None
    fields = LLAMA3_FIELDS if scaling.kind == "llama3" else {"factor": "factor"}
    return {"rope_type": scaling.kind} | {
        key: getattr(scaling, field) for key, field in fields.items()
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
    if name == "nanbeige":
        skips = not loop.normalize_between_loops
        return {"num_loops": loop.count, "skip_loop_final_norm": skips}
    if name == "ouro":
        return {"total_ut_steps": loop.count, "early_exit_threshold": loop.exit_threshold}
    for field, needed in (("gate_input", "query"), ("normalize_between_loops", False)):
        if getattr(loop, field) != needed:
            raise InputError(
                f"model.loop.{field} is {getattr(loop, field)}, which Hugging Face's model type "
                f"{name} cannot express, so the model cannot be exported"
            )
    return {"loop_num": loop.count, "loop_window_size": loop.window}


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
