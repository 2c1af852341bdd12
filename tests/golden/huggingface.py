"""Reads a golden case (config.json, model.safetensors, expected.npz) for tests/reference.py.

It shares no code with plt_jax.interop, which is tested against the same cases.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "cases"
PLT_TYPES = ("iquestpltcoder", "iquest_moe")


def read_case(folder):
    """Folder (pathlib.Path) -> (settings, params, expected), as tests/reference.py takes them.

    `expected` is the dict of expected.npz: input_ids [B, T], logits [B, T, V], and hidden_loops
    and hidden_loops_raw [L, B, T, D]. Raises AssertionError on a tensor or option left unread.
    """
    config = json.loads((folder / "config.json").read_text())
    settings = read_settings(config)
    params = read_params(settings, config["model_type"], load_file(folder / "model.safetensors"))
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    return settings, params, expected


def read_settings(config):
    """config.json's dict -> settings."""
    assert config["hidden_act"] == "silu" and config.get("rope_scaling") is None
    assert not config.get("attention_bias") and not config.get("mlp_bias")
    is_ouro = config["model_type"] == "ouro"
    is_moe = config["model_type"] == "iquest_moe"
    if is_moe:
        assert config["decoder_sparse_step"] == 1 and not config["mlp_only_layers"]
        moe = SimpleNamespace(
            experts=config["num_experts"],
            experts_per_token=config["num_experts_per_tok"],
            routing="topk_then_softmax",
            renormalize=config["norm_topk_prob"],
            shared_width=config["shared_expert_intermediate_size"],
            shared_gate=config["use_shared_expert_gate"],
        )
    else:
        moe = SimpleNamespace(
            experts=0,
            experts_per_token=0,
            routing="topk_then_softmax",
            renormalize=False,
            shared_width=0,
            shared_gate=False,
        )
    return SimpleNamespace(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        width=config["hidden_size"],
        rope_theta=config["rope_theta"],
        norm_epsilon=config["rms_norm_eps"],
        tied_embeddings=config["tie_word_embeddings"],
        rope_scaling=None,
        qkv_bias=False,
        output_bias=False,
        qk_norm=is_moe,
        qk_norm_over="head",
        input_norms=True,
        attention_output_norm=is_ouro,
        ffn_output_norm=is_ouro,
        residual_scale=1.0,
        loop=read_loop_settings(config),
        moe=moe,
    )


def read_loop_settings(config):
    """config.json's dict -> settings.loop. Windows here count the query's own key."""
    if config["model_type"] == "iquestloopcoder":
        return SimpleNamespace(
            scheme="loop_kv_share_window",
            count=config["loop_num"],
            window=config["loop_window_size"],
            gate_input="query",
            embedding_scale=1.0,
            hidden_scale=1.0,
            normalize_between_loops=False,
            first_layer=0,
            last_layer=None,
        )
    if config["model_type"] in ("nanbeige", "ouro"):
        weights = config.get("loop_loss_weights")
        loops = config.get("total_ut_steps") or config["num_loops"]
        return SimpleNamespace(
            scheme="vanilla_loop",
            count=len(weights) + 1 if weights else loops,
            window=1,
            normalize_between_loops=not config.get("skip_loop_final_norm"),
            first_layer=0,
            last_layer=None,
        )
    assert config["model_type"] in PLT_TYPES
    to_the_left, to_the_right = config["plt_window_size"]
    assert to_the_right == 0
    return SimpleNamespace(
        scheme="plt",
        count=config["plt_num_loops"],
        window=to_the_left + 1,
        gate_input="hidden" if config["plt_gate_use_hidden_states"] else "query",
        embedding_scale=config.get("plt_emb_scale", 1.0),
        hidden_scale=config.get("plt_hidden_scale", 1.0),
        normalize_between_loops=config.get("plt_normalize_per_loop", True),
        first_layer=0,
        last_layer=None,
    )


def read_params(settings, model_type, tensors):
    """Tensors by their published names (torch Linear weights are [out, in]) -> params."""
    tensors = dict(tensors)
    take = tensors.pop
    layers = [read_layer(settings, model_type, j, take) for j in range(settings.layers)]
    params = {
        "embedding": take("model.embed_tokens.weight"),
        "final_norm": take("model.norm.weight"),
        "layers": {name: np.stack([layer[name] for layer in layers]) for name in layers[0]},
    }
    if not settings.tied_embeddings:
        params["head"] = take("lm_head.weight").T
    if model_type == "ouro":
        params["exit_gate"] = take("model.early_exit_gate.weight").T
        params["exit_gate_bias"] = take("model.early_exit_gate.bias")
    assert not tensors, f"not read: {sorted(tensors)}"
    return params


def read_layer(settings, model_type, j, take):
    """Layer j's arrays, without the layer axis; `take` removes a tensor by name and returns it."""
    layer_name, attention = f"model.layers.{j}", f"model.layers.{j}.self_attn"
    d, h = settings.width, settings.head_width
    layer = {
        "attention_norm": take(f"{layer_name}.input_layernorm.weight"),
        "ffn_norm": take(f"{layer_name}.post_attention_layernorm.weight"),
        "q": take(f"{attention}.q_proj.weight").T.reshape(d, settings.heads, h),
        "k": take(f"{attention}.k_proj.weight").T.reshape(d, settings.kv_heads, h),
        "v": take(f"{attention}.v_proj.weight").T.reshape(d, settings.kv_heads, h),
        "o": take(f"{attention}.o_proj.weight").T.reshape(settings.heads, h, d),
    }
    if settings.qk_norm:
        layer["q_norm"] = take(f"{attention}.q_norm.weight")
        layer["k_norm"] = take(f"{attention}.k_norm.weight")

    if model_type == "ouro":
        layer["attention_output_norm"] = take(f"{layer_name}.input_layernorm_2.weight")
        layer["ffn_output_norm"] = take(f"{layer_name}.post_attention_layernorm_2.weight")
    if model_type in ("nanbeige", "ouro"):
        return layer | read_ffn(settings.moe, f"{layer_name}.mlp", take)
    is_plt = model_type in PLT_TYPES
    gate = f"{attention}.plt_gate" if is_plt else f"model.gate_projections.{j}"
    layer["gate_weight"] = take(f"{gate}.weight")
    layer["gate_bias"] = take(f"{gate}.bias")
    if settings.loop.gate_input == "hidden":
        layer["gate_weight"] = layer["gate_weight"].T  # [N, D] -> [D, N]
        layer["gate_norm"] = take(f"{gate}.gate_norm.weight")
    return layer | read_ffn(settings.moe, f"{layer_name}.mlp", take)


def read_ffn(moe, name, take):
    """One layer's feed-forward arrays, dense or mixture of experts."""

    def projections(prefix):  # gate and up [D, F], down [F, D]
        return [take(f"{prefix}.{part}_proj.weight").T for part in ("gate", "up", "down")]

    if not moe.experts:
        return dict(zip(("ffn_gate", "ffn_up", "ffn_down"), projections(name), strict=True))
    experts = [projections(f"{name}.experts.{e}") for e in range(moe.experts)]
    arrays = {"router": take(f"{name}.gate.weight").T}
    for position, part in enumerate(("expert_gate", "expert_up", "expert_down")):
        arrays[part] = np.stack([expert[position] for expert in experts])
    if moe.shared_width:
        shared = projections(f"{name}.shared_expert")
        arrays |= zip(("shared_gate_proj", "shared_up", "shared_down"), shared, strict=True)
    if moe.shared_gate:
        arrays["shared_router"] = take(f"{name}.shared_expert_gate.weight").T
    return arrays
