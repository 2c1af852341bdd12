"""Random configurations of every Hugging Face model type, for the interop tests."""

from hypothesis import strategies as st

from plt_jax import ModelConfig

SIZES = st.integers(1, 3)


@st.composite
def exportable_configs(draw) -> ModelConfig:
    """Draws any configuration that `save_huggingface` accepts, with a few hundred parameters."""
    scheme = draw(st.sampled_from(["no_loop", "vanilla_loop", "plt", "loop_kv_share_window"]))
    moe = scheme in ("no_loop", "plt") and draw(st.booleans())
    olmo = scheme == "no_loop" and not moe and draw(st.booleans())
    ouro = scheme == "vanilla_loop" and draw(st.booleans())
    kv_heads, group = draw(SIZES), draw(SIZES)
    heads, head_width = kv_heads * group, 2 * draw(SIZES)
    qkv_bias = draw(st.booleans())
    dense_looped = scheme in ("plt", "loop_kv_share_window") and not moe
    qk_norm = moe or olmo or (scheme != "vanilla_loop" and draw(st.booleans()))
    qkv_bias = qkv_bias and not ouro
    # llama, qwen3, olmo2 and nanbeige have all four biases or none, and qwen2 has the first three.
    any_biases = dense_looped or (scheme == "no_loop" and not qk_norm and not moe)
    output_bias = qkv_bias and not moe and (not any_biases or draw(st.booleans()))
    values = {
        "vocab_size": draw(st.integers(2, 9)),
        "max_length": draw(st.integers(1, 99)),
        "width": draw(st.integers(1, 7)),
        "layers": draw(SIZES),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": head_width,
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 5e5])),
        "rope_scaling": draw(rope_scalings()),
        "norm_epsilon": draw(st.sampled_from([1e-5, 1e-6])),
        "tied_embeddings": draw(st.booleans()),
        "qk_norm": qk_norm,
        "qkv_bias": qkv_bias,
        "output_bias": output_bias,
        "qk_norm_over": "all_heads" if olmo else "head",
        "input_norms": not olmo,
        "attention_output_norm": olmo or ouro,
        "ffn_output_norm": olmo or ouro or (dense_looped and draw(st.booleans())),
        "loop": draw(loops(scheme, ouro)),
    }
    if moe:
        values["moe"] = draw(mixtures(values["layers"]))
    if not moe or values["moe"]["dense_layers"]:
        values["ffn_width"] = draw(st.integers(1, 9))
    return ModelConfig.model_validate(values)


@st.composite
def loops(draw, scheme: str, ouro: bool) -> dict:
    if scheme == "no_loop":
        return {"scheme": scheme}
    if scheme == "vanilla_loop":
        loop = {"scheme": scheme, "count": draw(SIZES)}
        if not ouro:
            return loop | {"normalize_between_loops": draw(st.booleans())}
        return loop | {"exit_gate": True, "exit_threshold": draw(st.sampled_from([0.5, 1.0]))}
    loop = {"scheme": scheme, "count": draw(SIZES), "window": draw(st.integers(1, 70))}
    if scheme == "loop_kv_share_window":
        return loop | {"gate_input": "query", "normalize_between_loops": False}
    return loop | {
        "gate_input": draw(st.sampled_from(["query", "hidden"])),
        "embedding_scale": draw(st.sampled_from([1.0, 0.707])),
        "hidden_scale": draw(st.sampled_from([0.0, 0.053, 1.0])),
        "normalize_between_loops": draw(st.booleans()),
    }


@st.composite
def mixtures(draw, layers: int) -> dict:
    shared = draw(st.integers(0, 3))
    return {
        "dense_layers": draw(st.integers(0, layers - 1)),
        "experts": 3,
        "experts_per_token": draw(SIZES),
        "expert_width": draw(st.integers(1, 5)),
        "routing": "topk_then_softmax",
        "shared_width": shared,
        "shared_gate": bool(shared) and draw(st.booleans()),
    }


@st.composite
def rope_scalings(draw) -> dict:
    kind = draw(st.sampled_from(["none", "linear", "llama3"]))
    if kind == "none":
        return {}
    scaling = {"kind": kind, "factor": draw(st.sampled_from([1.0, 8.0]))}
    if kind == "linear":
        return scaling
    low = draw(st.sampled_from([1.0, 2.0]))
    return scaling | {
        "low_frequency_factor": low,
        "high_frequency_factor": 4 * low,
        "original_length": draw(st.integers(1, 99)),
    }
