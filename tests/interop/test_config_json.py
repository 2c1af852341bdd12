"""config.json to ModelConfig and back: published configurations, defaults, and model types."""

import pytest
from hypothesis import given, settings

from plt_jax import InputError, ModelConfig, load_config
from plt_jax.interop import config_reader
from plt_jax.interop.config_writer import write_config
from plt_jax.interop.model_types import MODEL_TYPES, choose_model_type
from plt_jax.interop.tensors import unstacked_parameters
from tests.interop.checkpoints import exportable_configs
from tests.models import small_config
from tests.training.runs import REPOSITORY

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LOOPCODER_V2 = {
    "architectures": ["IQuestPLTCoderForCausalLM"],
    "model_type": "iquestpltcoder",
    "vocab_size": 76800,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 14,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "plt_num_loops": 2,
    "plt_window_size": [64, 0],
    "plt_emb_scale": 0.707,
    "plt_hidden_scale": 0.053,
    "plt_normalize_per_loop": True,
    "plt_gate_use_hidden_states": True,
}
NANBEIGE = {
    "architectures": ["NanbeigeForCausalLM"],
    "model_type": "nanbeige",
    "vocab_size": 166144,
    "hidden_size": 3072,
    "intermediate_size": 10752,
    "num_hidden_layers": 22,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-05,
    "rope_theta": 70000000.0,
    "tie_word_embeddings": False,
    "kv_channels": 128,
    "num_loops": 2,
    "loop_loss_weights": [],
    "skip_loop_final_norm": False,
}
OURO = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
}
OLMO2 = {
    "input_norms": False,
    "attention_output_norm": True,
    "ffn_output_norm": True,
    "qk_norm": True,
    "qk_norm_over": "all_heads",
}
IQUEST_LOOP = {
    **{key: LOOPCODER_V2[key] for key in LOOPCODER_V2 if not key.startswith("plt_")},
    "architectures": ["IQuestLoopCoderForCausalLM"],
    "model_type": "iquestloopcoder",
    "num_hidden_layers": 80,
    "loop_num": 2,
    "loop_window_size": 64,
}


def read_config(values):
    """The configuration alone, without the model type."""
    return config_reader.read_config(values)[1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("loopcoder_v2", LOOPCODER_V2),
        ("iquest_coder_v1_40b_loop", IQUEST_LOOP),
        ("nanbeige_4.2_3b", NANBEIGE),
        ("ouro_1.4b", OURO),
    ],
)
def test_shipped_configs_are_the_published_shapes(name, values):
    shipped = load_config(REPOSITORY / "configs" / f"{name}.yaml").model
    runtime = {"dtype": "float32", "remat": "none"}
    assert read_config(values) == shipped.model_copy(update=runtime)


@settings(max_examples=200)
@given(exportable_configs())
def test_a_written_config_is_read_back(config):
    values = write_config(config, "float32", {"eos_token_id": [1, 2]})
    tensors = [
        name for parameter in unstacked_parameters(config) for name in parameter.tensor_names
    ]
    assert config_reader.read_config(values, tensors) == (values["model_type"], config)
    assert values["eos_token_id"] == [1, 2]
    assert values["architectures"] == [MODEL_TYPES[values["model_type"]].architecture]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "llama"),
        ({"qkv_bias": True, "output_bias": True}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "qkv_bias": True, "output_bias": True}, "qwen3"),
        (OLMO2, "olmo2"),
    ],
)
def test_the_model_type_for_dense_models(options, name):
    assert choose_model_type(small_config("no_loop", 1, **options)) == name


def test_the_model_type_for_looped_models():
    assert choose_model_type(small_config("plt")) == "iquestpltcoder"
    assert choose_model_type(small_config("loop_kv_share_window")) == "iquestloopcoder"
    assert choose_model_type(small_config("plt", qk_norm=True, moe={"experts": 4})) == "iquest_moe"


def test_both_orders_of_routing_that_sum_to_one_are_the_same_model():
    for moe in ({"routing": "topk_then_softmax"}, {"routing": "softmax_then_topk"}):
        config = small_config("plt", qk_norm=True, moe={"experts": 4, **moe})
        assert choose_model_type(config) == "iquest_moe"
    config = small_config("plt", qk_norm=True, moe={"experts": 4, "renormalize": False})
    with pytest.raises(InputError, match=r"model\.moe\.renormalize is False"):
        choose_model_type(config)
    config = small_config("plt", qk_norm=True, moe={"experts": 4, "bias_update_rate": 0.5})
    with pytest.raises(InputError, match=r"model\.moe\.bias_update_rate is 0\.5"):
        choose_model_type(config)


def test_only_leading_layers_may_be_dense():
    values = {"model_type": "iquest_moe", **MOE, "intermediate_size": 24}
    assert read_config(values | {"mlp_only_layers": [0]}).moe.dense_layers == 1
    for layers in ([1], [0, 2], [0, 0]):
        with pytest.raises(InputError, match=r"mlp_only_layers is .* known: leading layers"):
            read_config(values | {"mlp_only_layers": layers})
    with pytest.raises(InputError, match="dense_layers 3 leaves none of the 3 layers"):
        read_config(values | {"mlp_only_layers": [0, 1, 2]})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (small_config("clp"), "model.loop.scheme clp has no Hugging Face model type"),
        (small_config("clp_kv_share"), "scheme clp_kv_share has no"),
        (small_config("vanilla_loop", moe={"experts": 2}), "vanilla_loop with experts has no"),
        (small_config("vanilla_loop", qk_norm=True), "model.qk_norm is True, which"),
        (small_config("vanilla_loop", exit_gate=True), "model.attention_output_norm is False"),
        (
            small_config("vanilla_loop", attention_output_norm=True, ffn_output_norm=True),
            "model.loop.exit_gate is False, which",
        ),
        (
            small_config(
                "vanilla_loop",
                attention_output_norm=True,
                ffn_output_norm=True,
                exit_gate=True,
                normalize_between_loops=False,
            ),
            "model.loop.normalize_between_loops is False, which",
        ),
        (small_config("plt", last_layer=0), "model.loop.last_layer is 0, which"),
        (small_config("vanilla_loop", first_layer=1), "model.loop.first_layer is 1, which"),
        (
            small_config("plt", qk_norm=True, qk_norm_over="all_heads"),
            "model.qk_norm_over is all_heads, which",
        ),
        (small_config("no_loop", 1, moe={"experts": 2}), "model.qk_norm is False, which"),
        (
            small_config("loop_kv_share_window", moe={"experts": 2}),
            "loop_kv_share_window with experts has no",
        ),
        (small_config("plt", moe={"experts": 2}), "model.qk_norm is False, which"),
        (small_config("no_loop", 1, ffn_output_norm=True), "model.ffn_output_norm is True, which"),
        (small_config("no_loop", 1, output_bias=True), "model.output_bias is True, which"),
        (small_config("no_loop", 1, qk_norm=True, qkv_bias=True), "model.qkv_bias is True, which"),
        (
            small_config("plt", qk_norm=True, output_bias=True, moe={"experts": 2}),
            "model.output_bias is True, which",
        ),
        (
            small_config("loop_kv_share_window", gate_input="hidden"),
            "model.loop.gate_input is hidden, which",
        ),
        (
            small_config("loop_kv_share_window", normalize_between_loops=True),
            "model.loop.normalize_between_loops is True, which",
        ),
    ],
)
def test_a_config_that_no_model_type_can_express_is_refused(config, expected):
    with pytest.raises(InputError) as refusal:
        write_config(config, "float32", {})
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_absent_keys_have_the_defaults_of_their_type():
    llama = read_config({"model_type": "llama", **SHAPE})
    assert (llama.rope_theta, llama.norm_epsilon) == (10000.0, 1e-6)
    assert (llama.kv_heads, llama.head_width, llama.tied_embeddings) == (4, 16, False)
    assert not (llama.qk_norm or llama.qkv_bias or llama.output_bias)
    plt = read_config({"model_type": "iquestpltcoder", **SHAPE})
    assert (plt.rope_theta, plt.norm_epsilon) == (500000.0, 1e-5)
    assert (plt.loop.count, plt.loop.window, plt.loop.gate_input) == (2, 65, "query")
    assert (plt.loop.embedding_scale, plt.loop.hidden_scale) == (1.0, 1.0)
    assert plt.loop.normalize_between_loops
    loop = read_config({"model_type": "iquestloopcoder", **SHAPE}).loop
    assert (loop.count, loop.window, loop.normalize_between_loops) == (2, 64, False)


def test_defaults_of_the_looped_and_the_plain_types():
    nanbeige = read_config({"model_type": "nanbeige", **SHAPE, "kv_channels": 32})
    loop = nanbeige.loop
    assert nanbeige.head_width == 32  # Megatron's name of it
    assert (loop.scheme, loop.count, loop.normalize_between_loops) == ("vanilla_loop", 1, True)
    ouro = read_config({"model_type": "ouro", **SHAPE})
    assert (ouro.loop.count, ouro.loop.exit_gate, ouro.loop.exit_threshold) == (4, True, 1.0)
    assert ouro.input_norms and ouro.attention_output_norm and ouro.ffn_output_norm
    olmo2 = read_config({"model_type": "olmo2", **SHAPE})
    assert {name: getattr(olmo2, name) for name in OLMO2} == OLMO2
    assert (olmo2.rope_theta, olmo2.norm_epsilon) == (10000.0, 1e-5)
    coder = read_config({"model_type": "iquestcoder", **SHAPE})
    assert (coder.rope_theta, coder.norm_epsilon, coder.loop.scheme) == (5e5, 1e-5, "no_loop")


def test_loss_weights_count_nanbeiges_loops():
    def count(**keys):
        return read_config({"model_type": "nanbeige", **SHAPE, **keys}).loop.count

    assert count(loop_loss_weights=[0.1, 0.2]) == 3
    assert count(loop_loss_weights=[0.1, 0.2], num_loops=2) == 3
    assert count(loop_loss_weights=[], num_loops=2) == 2


def test_mistral_has_a_window_unless_null_says_that_it_has_none():
    mistral = {"model_type": "mistral", **SHAPE}
    llama = read_config({"model_type": "llama", **SHAPE})
    longer = {"max_position_embeddings": 8192}
    assert read_config(mistral) == llama  # a window of 4096 holds all 128 positions
    assert read_config(mistral | {"sliding_window": 128}) == llama
    assert read_config(mistral | longer | {"sliding_window": None}).max_length == 8192
    for keys in (longer, longer | {"sliding_window": 4096}, {"sliding_window": 127}):
        with pytest.raises(InputError, match=r"sliding_window is .* not supported; known: none"):
            read_config(mistral | keys)


def test_a_null_counts_as_an_absent_key():
    nulls = ["num_key_value_heads", "head_dim", "rope_scaling", "sliding_window", "plt_emb_scale"]
    values = {"model_type": "iquestpltcoder", **SHAPE}
    assert read_config(values | dict.fromkeys(nulls)) == read_config(values)


def test_a_model_type_is_found_by_its_name_or_by_its_architecture():
    by_name = read_config({"model_type": "iquest_moe", **MOE})
    by_architecture = read_config(
        {"model_type": "iquest_moe_v12", "architectures": ["IquestMoeV12ForCausalLM"], **MOE}
    )
    assert by_name == by_architecture
    assert by_name.qk_norm and by_name.moe.experts == 6


MOE = SHAPE | {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "use_shared_expert_gate": True,
}


def test_a_shared_experts_gate_needs_a_shared_expert():
    values = {"model_type": "iquest_moe", **MOE}
    assert not read_config(values).moe.shared_gate
    assert read_config(values | {"shared_expert_intermediate_size": 8}).moe.shared_gate


def test_rope_is_read_as_transformers_4_and_5_write_it():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    four = {"rope_theta": 7.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    older = {"rope_theta": 7.0, "rope_scaling": {"type": "llama3", **scaling}}
    five = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **scaling}}
    configs = [
        read_config({"model_type": "llama", **SHAPE, **form}) for form in (four, older, five)
    ]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_theta == 7.0
    assert configs[0].rope_scaling.model_dump() == {
        "kind": "llama3",
        "factor": 8.0,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_length": 8192,
    }


def test_extra_keys_count_only_for_looped_model_types():
    on = {"qk_norm": True, "qkv_bias": True, "ffn_output_norm": True}
    plt = read_config({"model_type": "iquestpltcoder", **SHAPE, **on})
    assert plt.qk_norm and plt.qkv_bias and plt.ffn_output_norm and not plt.output_bias
    assert read_config({"model_type": "llama", **SHAPE, **on}) == read_config(
        {"model_type": "llama", **SHAPE}
    )


def test_a_sliding_window_that_qwen_does_not_use_is_accepted():
    values = {"model_type": "qwen2", **SHAPE}
    unused = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
    assert read_config(values | unused) == read_config(values)
    assert isinstance(read_config(values), ModelConfig)
