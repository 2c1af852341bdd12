"""A config.json that the model does not support is refused in one line, and nothing is written."""

import pytest
from safetensors.numpy import load_file, save_file

from plt_jax import load_huggingface
from tests.golden.huggingface import GOLDEN
from tests.interop.damage import (
    MOE,
    REMOVED,
    assert_import_refused,
    assert_same_params,
    change_config,
    copy_case,
    copy_folder,
    saved_model,
)

# The model type.


@pytest.mark.parametrize(
    ("model_type", "architectures", "named"),
    [
        ("gemma3", ["Gemma3ForCausalLM"], "'gemma3'"),
        ("gemma3", REMOVED, "'gemma3'"),
        (REMOVED, ["Gemma3ForCausalLM"], "Gemma3ForCausalLM"),
        (REMOVED, REMOVED, "None"),
        (None, None, "None"),
        ("LLAMA", [], "'LLAMA'"),
    ],
)
def test_an_unknown_model_type_is_refused_with_the_known_ones(
    llama, model_type, architectures, named
):
    change_config(llama, model_type=model_type, architectures=architectures)
    assert_import_refused(
        llama, llama / "config.json", "unknown model_type", named, "qwen3", "iquest_moe"
    )


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "Qwen2ForCausalLM"),
        ("llama", "IQuestPLTCoderForCausalLM"),
        ("qwen3", "LlamaForCausalLM"),
        ("iquestpltcoder", "IQuestLoopCoderForCausalLM"),
    ],
)
def test_a_model_type_and_an_architecture_that_disagree_are_refused(
    llama, model_type, architecture
):
    change_config(llama, model_type=model_type, architectures=[architecture])
    assert_import_refused(llama, llama / "config.json", model_type, architecture)


@pytest.mark.parametrize("absent", ["model_type", "architectures"])
def test_the_model_type_or_the_architecture_suffices(llama, absent):
    expected = load_huggingface(llama)
    change_config(llama, **{absent: REMOVED})
    config, params = load_huggingface(llama)
    assert config == expected[0]
    assert_same_params(params, expected[1])


def test_experts_are_found_by_their_architecture_for_any_model_type(tmp_path):
    # The public checkpoints have another model_type than the golden cases.
    source = saved_model(tmp_path / "source", qk_norm=True, moe=MOE)
    expected, _ = load_huggingface(source)
    change_config(source, model_type="iquest_moe_v12")
    assert load_huggingface(source)[0] == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", 3),
        ("model_type", ["llama"]),
        ("model_type", {"llama": 1}),
        ("architectures", 3),
        ("architectures", [["LlamaForCausalLM"]]),
        ("architectures", {"a": "b"}),
        ("layer_types", 3),
        ("layer_types", "full_attention"),
        ("rope_parameters", "default"),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": ["yarn"]}),
    ],
)
def test_a_list_or_mapping_in_the_wrong_place_is_refused(llama, key, value):
    others = {} if key != "architectures" else {"model_type": REMOVED}
    change_config(llama, **{key: value}, **others)
    assert_import_refused(llama, llama / "config.json")


# The file.


def test_a_missing_config_is_refused(llama):
    (llama / "config.json").unlink()
    assert_import_refused(llama, f"cannot read {llama / 'config.json'}: No such file")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"model_type: llama", "not valid JSON"),
        (b'{"model_type": "llama",\n "vocab', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'["llama"]', "must hold a mapping, not a list"),
        (b"null", "must hold a mapping"),
        (b'"llama"', "must hold a mapping, not a str"),
    ],
)
def test_a_config_that_is_no_json_mapping_is_refused(llama, content, named):
    (llama / "config.json").write_bytes(content)
    assert_import_refused(llama, llama / "config.json", named)


def test_a_config_that_is_a_folder_is_refused(llama):
    (llama / "config.json").unlink()
    (llama / "config.json").mkdir()
    assert_import_refused(llama, f"cannot read {llama / 'config.json'}: Is a directory")


# The values.

REQUIRED = [
    *["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"],
    *["num_attention_heads", "max_position_embeddings"],
]
OPTIONAL = ["num_key_value_heads", "head_dim", "rms_norm_eps"]


@pytest.mark.parametrize("value", [REMOVED, None], ids=["absent", "null"])
@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_refused(llama, key, value):
    change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", f"{key} is missing")


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_a_missing_key_of_experts_is_refused(tmp_path, key):
    source = saved_model(tmp_path / "source", qk_norm=True, moe=MOE)
    change_config(source, **{key: REMOVED})
    assert_import_refused(source, source / "config.json", f"{key} is missing")


@pytest.mark.parametrize("value", ["many", [4], {}, 0, -1], ids=repr)
@pytest.mark.parametrize("key", [*REQUIRED, *OPTIONAL])
def test_a_value_that_is_not_a_positive_number_is_refused(llama, key, value):
    change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", f"= {value!r}")


@pytest.mark.parametrize("key", [*REQUIRED, "num_key_value_heads", "head_dim"])
def test_a_fraction_for_a_size_is_refused(llama, key):
    change_config(llama, **{key: 4.5})
    assert_import_refused(llama, llama / "config.json", "= 4.5")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1e-5"], ids=repr)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "factor"])
def test_a_value_that_is_not_a_finite_number_is_refused(llama, key, value):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    if key in rope:
        change_config(llama, rope_parameters=rope | {key: value})
    else:
        change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", repr(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_position_embeddings", "64"), ("max_position_embeddings", True), ("hidden_size", "32")],
)
def test_a_string_or_boolean_for_a_size_is_refused(llama, key, value):
    change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", repr(value))


def test_heads_that_key_value_heads_do_not_divide_are_refused(llama):
    change_config(llama, num_key_value_heads=3)
    assert_import_refused(llama, llama / "config.json", "4 is not divisible by", "3", "[1, 2, 4]")


def test_an_odd_head_width_is_refused(llama):
    change_config(llama, head_dim=7)
    assert_import_refused(llama, llama / "config.json", "7 is odd")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "mrope"])
@pytest.mark.parametrize(
    ("section", "kind_key"),
    [("rope_parameters", "rope_type"), ("rope_scaling", "rope_type"), ("rope_scaling", "type")],
)
def test_an_unsupported_rope_scaling_is_refused(llama, section, kind_key, kind):
    change_config(llama, rope_parameters=REMOVED)
    change_config(llama, **{section: {kind_key: kind, "factor": 4.0}})
    assert_import_refused(llama, llama / "config.json", "rope_scaling", kind, "not supported")


def test_an_unsupported_rope_scaling_beside_rope_parameters_is_refused(llama):
    # Where both are given, transformers 5 reads rope_scaling.
    change_config(llama, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert_import_refused(llama, llama / "config.json", "yarn")


def test_rope_parameters_by_kind_of_layer_are_refused(llama):
    rope = {"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}
    change_config(llama, rope_parameters=rope)
    assert_import_refused(llama, llama / "config.json", "full_attention")


def test_rotating_a_part_of_a_head_is_refused(llama):
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    change_config(llama, rope_parameters=rope)
    assert_import_refused(llama, llama / "config.json", "partial_rotary_factor", "0.5")


@pytest.mark.parametrize("lacking", [key for key in LLAMA3 if key != "rope_type"])
def test_a_llama3_scaling_that_lacks_a_key_is_refused(llama, lacking):
    rope = {key: value for key, value in LLAMA3.items() if key != lacking}
    change_config(llama, rope_parameters=rope)
    assert_import_refused(llama, llama / "config.json", "llama3", f"lacks {lacking}")


def test_a_linear_scaling_without_a_factor_is_refused(llama):
    change_config(llama, rope_parameters={"rope_type": "linear"})
    assert_import_refused(llama, llama / "config.json", "linear", "lacks factor")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"factor": None}, "lacks factor"),
        ({"factor": "eight"}, "'eight'"),
        ({"factor": 0.5}, "0.5"),
        ({"low_freq_factor": 4.0}, "4.0"),
        ({"original_max_position_embeddings": 0}, "= 0"),
    ],
)
def test_a_llama3_scaling_with_an_impossible_value_is_refused(llama, change, named):
    change_config(llama, rope_parameters=LLAMA3 | change)
    assert_import_refused(llama, llama / "config.json", named)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("use_sliding_window", True),
        ("sliding_window", 32),
        ("quantization_config", {"quant_method": "fp8"}),
        ("mlp_only_layers", [0]),
        ("decoder_sparse_step", 2),
        ("clip_qkv", 8.0),
        ("partial_rotary_factor", 0.5),
        ("early_exit_step", 1),
        ("enable_mhc", True),
    ],
)
def test_arithmetic_that_the_model_does_not_have_is_refused_by_name(llama, key, value):
    change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", f"{key} is {value!r}", "not supported")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_layernorm", True),
        ("emb_neighbor_num", 0),
        ("insert_ngram_layer_idx", [1]),
        ("ngram_insert_all_layers", True),
        ("enable_double_loop_split", True),
        ("loop_middle_layers", [0, 1]),
        ("loop_middle_layers", 2),
        ("loop_share_kv", True),
        ("enable_hyper_connection", True),
        ("enable_mhc", True),
        ("enable_h_res_identity", True),
        ("enable_depth_attention", True),
    ],
)
def test_nanbeiges_other_architectures_are_refused_by_name(nanbeige, key, value):
    change_config(nanbeige, **{key: value})
    assert_import_refused(nanbeige, nanbeige / "config.json", f"{key} is {value!r}")


def test_nanbeiges_keys_that_change_nothing_are_read(nanbeige):
    expected, _ = load_huggingface(nanbeige)
    nothing = {"qk_layernorm": False, "emb_neighbor_num": None, "insert_ngram_layer_idx": []}
    nothing |= {"loop_middle_layers": [], "loop_share_kv": False, "enable_mhc": False}
    change_config(nanbeige, **nothing, loop_loss_weights=[])
    assert load_huggingface(nanbeige)[0] == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_loops", 2),
        ("total_ut_steps", 4),
        ("skip_loop_final_norm", False),
        ("loop_loss_weights", [0.5]),
    ],
)
def test_loops_of_another_model_type_are_refused_by_name(llama, key, value):
    change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", f"{key} is {value!r}", "how a model loops")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_loops", 0), ("num_loops", "2"), ("skip_loop_final_norm", 1), ("num_loops", 2.5)],
)
def test_impossible_loops_are_refused(nanbeige, key, value):
    change_config(nanbeige, **{key: value})
    assert_import_refused(nanbeige, nanbeige / "config.json", key)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("early_exit_threshold", 0.0, "exit_threshold"),
        ("early_exit_threshold", 1.5, "exit_threshold"),
        ("attention_bias", True, "model_type ouro has no biases"),
        ("total_ut_steps", -1, "total_ut_steps"),
    ],
)
def test_an_ouro_that_cannot_be_is_refused(tmp_path, key, value, named):
    ouro = copy_folder(GOLDEN.parent / "ouro" / "ouro_l2_wide_heads", tmp_path / "source")
    change_config(ouro, **{key: value})
    assert_import_refused(ouro, ouro / "config.json", named)


def test_an_ouro_without_its_gate_is_refused(tmp_path):
    """It would be a nanbeige with sandwich norms, which no model type is."""
    ouro = copy_folder(GOLDEN.parent / "ouro" / "ouro_l2_wide_heads", tmp_path / "source")
    tensors = load_file(ouro / "model.safetensors")
    del tensors["model.early_exit_gate.bias"]
    save_file(tensors, ouro / "model.safetensors")
    assert_import_refused(ouro, ouro, "tensor model.early_exit_gate.bias (1,) is missing")


def test_a_layer_with_a_sliding_window_is_refused(llama):
    change_config(llama, layer_types=["full_attention", "sliding_attention"])
    assert_import_refused(llama, llama / "config.json", "layer_types", "'sliding_attention'")


def test_a_sliding_window_that_is_in_use_is_refused(tmp_path):
    source = copy_case("qwen2", tmp_path / "source")
    change_config(source, use_sliding_window=True, sliding_window=4096)
    assert_import_refused(source, source / "config.json", "use_sliding_window is True")


@pytest.mark.parametrize(
    "window",
    [
        *[64, "64", {}, [], [64], [64, 1], [64, -1], [-1, 0], [64, 0, 0], [64, None], [1.5, 0]],
        *[["64", 0], [None, 0], [[64], 0]],
    ],
    ids=repr,
)
def test_a_window_of_the_wrong_form_is_refused(plt, window):
    change_config(plt, plt_window_size=window)
    assert_import_refused(plt, plt / "config.json", "window")


@pytest.mark.parametrize("count", [0, -1, 1.5, "two", [2]], ids=repr)
def test_an_impossible_number_of_loops_is_refused(plt, count):
    change_config(plt, plt_num_loops=count)
    assert_import_refused(plt, plt / "config.json", "plt_num_loops", repr(count))
