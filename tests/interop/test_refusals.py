"""Checkpoints that cannot be converted: refused in one line, and nothing is written."""

import contextlib
import json
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import plt_jax.run
from plt_jax import InputError, RunConfig, load_huggingface, save_huggingface
from plt_jax.checkpoint import save_params
from plt_jax.data.tokenizer import train_tokenizer
from plt_jax.run import create_run
from plt_jax.run_files import CHECKPOINTS, CONFIG, HUGGINGFACE
from tests.models import random_params, small_config
from tests.training.runs import (
    REPOSITORY,
    SENTENCE,
    Result,
    assert_refused,
    command,
    environment,
    make_home,
    snapshot,
    tiny_values,
    write_config,
)

CASES = Path(__file__).parents[1] / "golden" / "transformers"
CONVERT = "plt_jax.convert"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
REMOVED = object()
MOE = {"experts": 4, "experts_per_token": 2, "expert_width": 8, "routing": "topk_then_softmax"}


def copy_case(name, folder):
    """A transformers checkpoint, to damage."""
    folder.mkdir()
    for file in ("config.json", MODEL):
        shutil.copyfile(CASES / name / file, folder / file)
    return folder


@pytest.fixture
def llama(tmp_path):
    return copy_case("llama", tmp_path / "source")


@pytest.fixture
def tied(tmp_path):
    return copy_case("llama_rope_llama3_tied", tmp_path / "source")


@pytest.fixture
def sharded(llama):
    """As llama, in two files: EMBEDDING in the first, Q in the second."""
    tensors = load_file(llama / MODEL)
    first = {name: tensors[name] for name in (EMBEDDING, HEAD)}
    second = {name: tensors[name] for name in tensors.keys() - first.keys()}
    save_file(first, llama / FIRST)
    save_file(second, llama / SECOND)
    write_index(llama, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND))
    (llama / MODEL).unlink()
    return llama


def saved_model(folder, *scheme, **settings):
    """A checkpoint of a small random model."""
    config = small_config(*scheme, **settings)
    save_huggingface(folder, config, random_params(config))
    return folder


@pytest.fixture
def plt(tmp_path):
    return saved_model(tmp_path / "source")


def write_index(folder, files):
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def change_index(folder, **files):
    write_index(folder, json.loads((folder / INDEX).read_text())["weight_map"] | files)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    values = read_config(folder) | changes
    values = {key: value for key, value in values.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(values))


def change_tensors(folder, changes, file=MODEL):
    tensors = load_file(folder / file) | changes
    save_file({k: v for k, v in tensors.items() if v is not REMOVED}, folder / file)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def assert_import_refused(source, *parts):
    """By load_huggingface and by the command in the same line, with everything left as it was."""
    before = snapshot(source.parent)
    with pytest.raises(InputError) as refusal:
        load_huggingface(source)
    message = str(refusal.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert str(part) in message
    result = command(CONVERT, "import", source, source.parent / "destination")
    assert_refused(result, message)
    assert result.out == ""
    assert snapshot(source.parent) == before


def assert_export_refused(home, config, params, *parts):
    before = snapshot(home)
    with pytest.raises(InputError) as refusal:
        save_huggingface(home / "destination", config, params)
    assert len(str(refusal.value).splitlines()) == 1
    for part in parts:
        assert part in str(refusal.value)
    assert snapshot(home) == before


def assert_command_refused(home, words, *parts):
    """By the command `words`, with everything below `home` left as it was."""
    before = snapshot(home)
    assert_refused(command(*words), *map(str, parts))
    assert snapshot(home) == before


def assert_same_params(one, other):
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


# config.json: the kind of model.


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


def test_experts_are_known_by_their_architecture_whatever_the_model_type(tmp_path):
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


# config.json: the file.


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


# config.json: the values.

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
def test_what_is_no_positive_number_is_refused(llama, key, value):
    change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", f"= {value!r}")


@pytest.mark.parametrize("key", [*REQUIRED, "num_key_value_heads", "head_dim"])
def test_a_fraction_for_a_size_is_refused(llama, key):
    change_config(llama, **{key: 4.5})
    assert_import_refused(llama, llama / "config.json", "= 4.5")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1e-5"], ids=repr)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "factor"])
def test_what_is_no_finite_json_number_is_refused(llama, key, value):
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


def test_a_rope_scaling_beside_rope_parameters_is_not_dropped(llama):
    # Where both stand, transformers 5 goes by rope_scaling.
    change_config(llama, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert_import_refused(llama, llama / "config.json", "yarn")


def test_rope_parameters_of_their_own_for_each_kind_of_layer_are_not_dropped(llama):
    rope = {"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}
    change_config(llama, rope_parameters=rope)
    assert_import_refused(llama, llama / "config.json", "full_attention")


def test_rotating_a_part_of_a_head_is_refused_wherever_it_is_said(llama):
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
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "fp8"}),
        ("mlp_only_layers", [0]),
        ("decoder_sparse_step", 2),
        ("clip_qkv", 8.0),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_arithmetic_that_the_model_lacks_is_refused_by_name(llama, key, value):
    change_config(llama, **{key: value})
    assert_import_refused(llama, llama / "config.json", f"{key} is {value!r}", "not supported")


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


# Tensors.


def test_a_missing_tensor_is_refused(llama):
    change_tensors(llama, {Q: REMOVED})
    assert_import_refused(llama, llama, Q, "(32, 32)", "missing")


def test_the_missing_tensors_of_more_layers_are_refused(llama):
    change_config(llama, num_hidden_layers=3)
    assert_import_refused(llama, llama, "model.layers.2.input_layernorm.weight", "(32,)", "missing")


def test_a_missing_head_is_refused(llama):
    change_tensors(llama, {HEAD: REMOVED})
    assert_import_refused(llama, llama, HEAD, "(67, 32)", "missing")


def test_missing_gates_are_refused(plt):
    change_tensors(plt, {"model.layers.0.self_attn.plt_gate.bias": REMOVED})
    assert_import_refused(plt, plt, "model.layers.0.self_attn.plt_gate.bias", "(4,)", "missing")


def test_a_dense_checkpoint_under_a_looped_type_is_refused(llama):
    change_config(llama, model_type="iquestpltcoder", architectures=REMOVED)
    assert_import_refused(llama, llama, "model.layers.0.self_attn.plt_gate", "missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.extra.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate.weight",
        "layers.0.self_attn.q_proj.weight",
    ],
)
def test_an_extra_tensor_is_refused(llama, name):
    change_tensors(llama, {name: zeros(3, 5)})
    assert_import_refused(llama, llama / MODEL, name, "(3, 5)", "no place")


def test_an_extra_tensor_in_a_shard_is_refused_with_the_shard(sharded):
    change_tensors(sharded, {"extra": zeros(3)}, SECOND)
    assert_import_refused(sharded, sharded / SECOND, "extra", "(3,)")


def test_a_name_with_a_line_break_does_not_break_the_line(llama):
    change_tensors(llama, {"two\nlines": zeros(3)})
    assert_import_refused(llama, llama / MODEL)


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        (Q, (32, 16), (32, 32)),
        (Q, (1024,), (32, 32)),
        (Q, (32, 32, 1), (32, 32)),
        (EMBEDDING, (64, 32), (67, 32)),
        (HEAD, (32, 67), (67, 32)),
        ("model.norm.weight", (), (32,)),
        ("model.layers.0.mlp.down_proj.weight", (48, 32), (32, 48)),
        ("model.layers.0.self_attn.k_proj.weight", (0, 32), (16, 32)),
    ],
)
def test_a_wrong_shape_is_refused_with_both(llama, name, found, wanted):
    change_tensors(llama, {name: zeros(*found)})
    assert_import_refused(llama, llama / MODEL, f"{name} has shape {found}", wanted)


def test_a_wrong_shape_in_a_shard_is_refused_with_the_shard(sharded):
    change_tensors(sharded, {Q: zeros(8, 8)}, SECOND)
    assert_import_refused(sharded, sharded / SECOND, f"{Q} has shape (8, 8)", "(32, 32)")


def test_a_wrong_shape_of_an_expert_is_refused(tmp_path):
    source = saved_model(tmp_path / "source", qk_norm=True, moe=MOE)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    change_tensors(source, {name: zeros(4, 16)})
    assert_import_refused(source, source / MODEL, f"{name} has shape (4, 16)", "(8, 16)")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.plt_gate.weight",
        "model.layers.0.self_attn.plt_gate.gate_norm.weight",
        "model.layers.0.self_attn.loop_gate_proj.bias",
        "model.gate_projections.0.weight",
    ],
)
def test_a_gate_under_a_dense_type_is_refused_with_the_looped_types(llama, name):
    change_tensors(llama, {name: zeros(4, 8)})
    assert_import_refused(llama, llama / MODEL, name, "(4, 8)", "gate", "iquestpltcoder")


@pytest.mark.parametrize("scheme", ["plt", "loop_kv_share_window"])
def test_a_looped_checkpoint_under_a_dense_type_is_refused(tmp_path, scheme):
    source = saved_model(tmp_path / "source", scheme, normalize_between_loops=scheme == "plt")
    change_config(source, model_type="llama", architectures=["LlamaForCausalLM"])
    key = "plt_num_loops" if scheme == "plt" else "loop_num"
    assert_import_refused(source, source / "config.json", f"{key} is 2", "model_type llama")
    looping = [key for key in read_config(source) if key.startswith(("plt_", "loop_"))]
    change_config(source, **dict.fromkeys(looping, REMOVED))
    assert_import_refused(source, source / MODEL, "gate of a looped model")


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("llama", {"plt_num_loops": 2}),
        ("qwen3", {"loop_num": 2}),
        ("iquestloopcoder", {"plt_hidden_scale": 0.1}),
        ("iquestpltcoder", {"loop_window_size": 8}),
        ("iquestpltcoder", {"plt_use_shift": False}),
        ("iquest_moe", {"scoring_func": "sigmoid"}),
        ("iquest_moe", {"routed_scaling_factor": 2.5}),
        ("iquest_moe", {"first_k_dense_replace": 1}),
    ],
)
def test_other_ways_to_loop_or_route_are_refused(tmp_path, model_type, change):
    settings = {
        "llama": {"scheme": "no_loop", "count": 1},
        "qwen3": {"scheme": "no_loop", "count": 1, "qk_norm": True},
        "iquestloopcoder": {"scheme": "loop_kv_share_window", "normalize_between_loops": False},
        "iquestpltcoder": {},
        "iquest_moe": {"qk_norm": True, "moe": MOE},
    }[model_type]
    source = saved_model(tmp_path / "source", **settings)
    assert read_config(source)["model_type"] == model_type
    load_huggingface(source)
    change_config(source, **change)
    ((key, value),) = change.items()
    assert_import_refused(source, source / "config.json", f"{key} is {value!r}")


def test_a_stretch_without_a_kind_is_refused(llama):
    change_config(llama, rope_parameters=REMOVED, rope_scaling={"factor": 4.0})
    assert_import_refused(llama, llama / "config.json", "rope_scaling has a factor")


def test_more_layers_than_tensors_are_refused_at_once(llama):
    change_config(llama, num_hidden_layers=10**9)
    assert_import_refused(llama, llama / "config.json", "1000000000 layers")


def test_a_link_is_no_destination(llama, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    words = [CONVERT, "import", llama, tmp_path / "link"]
    assert_command_refused(tmp_path, words, tmp_path / "link", "is a link")


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.int8, np.bool_])
def test_an_unsupported_dtype_is_refused(llama, dtype):
    change_tensors(llama, {Q: zeros(32, 32, dtype=dtype)})
    name = {"int64": "I64", "float64": "F64", "int8": "I8", "bool": "BOOL"}[np.dtype(dtype).name]
    assert_import_refused(llama, llama / MODEL, Q, f"dtype {name}", "F32")


@pytest.mark.parametrize("dtype", ["int8", "float64", "float99"])
def test_an_unsupported_dtype_to_convert_to_is_refused(llama, tmp_path, dtype):
    before = snapshot(tmp_path)
    config, params = load_huggingface(llama)
    with pytest.raises(InputError, match=dtype):
        load_huggingface(llama, dtype=dtype)
    with pytest.raises(InputError, match=dtype):
        save_huggingface(tmp_path / "new", config, params, dtype=dtype)
    assert snapshot(tmp_path) == before


def test_a_head_that_differs_from_the_embeddings_it_is_tied_to_is_refused(tied):
    embedding = load_file(tied / MODEL)[EMBEDDING]
    embedding[66, 31] += 1
    change_tensors(tied, {HEAD: embedding})
    assert_import_refused(tied, tied / MODEL, HEAD, EMBEDDING, "tie_word_embeddings")


def test_a_tied_head_of_another_shape_is_refused(tied):
    change_tensors(tied, {HEAD: zeros(3, 5)})
    assert_import_refused(tied, tied / MODEL, HEAD)


def test_a_head_that_repeats_the_embeddings_it_is_tied_to_is_accepted(tied):
    config, expected = load_huggingface(tied)
    change_tensors(tied, {HEAD: load_file(tied / MODEL)[EMBEDDING]})
    again, params = load_huggingface(tied)
    assert again == config
    assert_same_params(params, expected)


def test_buffers_of_old_checkpoints_are_accepted(llama):
    _, expected = load_huggingface(llama)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    change_tensors(llama, {name.format(layer): zeros(4) for layer in (0, 1)})
    _, params = load_huggingface(llama)
    assert_same_params(params, expected)


# Safetensors files and their index.

WHOLE = (CASES / "llama" / MODEL).read_bytes()
HEADER = struct.unpack("<Q", WHOLE[:8])[0]


@pytest.mark.parametrize(
    "length",
    [
        *[0, 1, 7, 8, 9, 8 + HEADER // 2, 8 + HEADER - 1],
        *[8 + HEADER, 9 + HEADER, len(WHOLE) // 2, len(WHOLE) - 1],
    ],
)
def test_a_truncated_file_is_refused(llama, length):
    (llama / MODEL).write_bytes(WHOLE[:length])
    assert_import_refused(llama, llama / MODEL, "not a whole safetensors file", "fetch it again")


@pytest.mark.parametrize(
    "content",
    [
        b"<html><body>404 not found</body></html>" * 9,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        b"\xff" * 100,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b"{\n{\n{\n{\n",
        struct.pack("<Q", 2**62) + WHOLE[8:],
        struct.pack("<Q", HEADER - 1) + WHOLE[8:],
        WHOLE[:8] + b"\0" * HEADER + WHOLE[8 + HEADER :],
        WHOLE[:8] + WHOLE[8:].replace(b'"F32"', b'"Q32"', 1),
        WHOLE + b"\0",
    ],
)
def test_a_corrupted_file_is_refused(llama, content):
    (llama / MODEL).write_bytes(content)
    assert_import_refused(llama, llama / MODEL, "not a whole safetensors file")


def test_a_folder_in_the_place_of_a_file_is_refused(llama):
    (llama / MODEL).unlink()
    (llama / MODEL).mkdir()
    assert_import_refused(llama, llama / MODEL)


@pytest.mark.parametrize("length", [0, 100, 2000])
def test_a_truncated_shard_is_refused(sharded, length):
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:length])
    assert_import_refused(sharded, sharded / SECOND, "not a whole safetensors file")


def test_an_index_that_names_a_missing_shard_is_refused(sharded):
    (sharded / SECOND).unlink()
    assert_import_refused(sharded, sharded / SECOND, "is missing", sharded / INDEX, "model.")


def test_an_index_with_a_tensor_in_the_wrong_shard_is_refused(sharded):
    change_index(sharded, **{Q: FIRST})
    assert_import_refused(sharded, sharded / INDEX, Q, FIRST)


def test_an_index_with_a_tensor_that_is_in_no_shard_is_refused(sharded):
    change_index(sharded, **{"model.extra.weight": FIRST})
    assert_import_refused(sharded, sharded / INDEX, "model.extra.weight", FIRST)


def test_a_tensor_in_two_shards_is_refused(sharded):
    change_tensors(sharded, {Q: zeros(32, 32)}, FIRST)
    assert_import_refused(sharded, sharded / FIRST, sharded / SECOND, Q)


@pytest.mark.parametrize("outside", ["..", "../x", "../source/" + FIRST, "/x", "sub/x", "", "."])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(sharded, outside):
    (sharded.parent / "x").write_bytes(WHOLE)
    change_index(sharded, **{Q: outside})
    assert_import_refused(sharded, sharded / INDEX, "not a safetensors file in its folder", Q)


@pytest.mark.parametrize("name", ["x" * 300, "two\nlines"], ids=["too long", "two lines"])
def test_an_index_that_names_an_impossible_file_is_refused(sharded, name):
    change_index(sharded, **{Q: name})
    assert_import_refused(sharded, sharded / INDEX)


@pytest.mark.parametrize(
    "content",
    [
        *[b"", b"{", b"weight_map", b"\xff\xfe", b"[]", b"{}", b"null", b'{"weight_map": null}'],
        *[b'{"weight_map": ["model.safetensors"]}', b'{"weight_map": {"a": 1}}'],
    ],
)
def test_an_index_that_is_none_is_refused(sharded, content):
    (sharded / INDEX).write_bytes(content)
    assert_import_refused(sharded, sharded / INDEX, "is not an index")


def test_an_empty_index_is_refused(sharded):
    write_index(sharded, {})
    assert_import_refused(sharded, sharded / "config.json", "there are only 0 tensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.safetensors"])
def test_other_files_alone_are_refused_and_named(llama, name):
    (llama / MODEL).rename(llama / name)
    assert_import_refused(llama, llama, MODEL, f"it holds {name}", "only safetensors")


def test_a_folder_without_weights_is_refused(llama):
    (llama / MODEL).unlink()
    assert_import_refused(llama, llama, f"neither {MODEL} nor {INDEX}")


# Sources and destinations.


def test_a_source_that_does_not_exist_is_refused(tmp_path):
    assert_import_refused(tmp_path / "none", tmp_path / "none")


def test_a_source_that_is_a_file_is_refused(llama):
    assert_import_refused(llama / "config.json", llama / "config.json", "not a folder")


def test_a_source_with_an_impossible_name_is_refused(tmp_path):
    assert_import_refused(tmp_path / ("x" * 300), "x" * 300)


def run_of(folder, config, tokenizer=None, files=None):
    """A run directory with a checkpoint of random parameters, as an import makes it."""
    create_run(
        RunConfig(run_dir=str(folder), model=config), random_params(config), tokenizer, files or {}
    )
    return folder


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "dense", small_config("no_loop", 1))


@pytest.fixture(scope="module")
def plt_run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "plt", small_config())


def taken_folder(home):
    (home / "taken").mkdir()
    (home / "taken" / "notes.txt").write_text("mine")
    return home / "taken"


def taken_file(home):
    (home / "file").write_text("mine")
    return home / "file"


def below_a_file(home):
    return taken_file(home) / "new"


def below_a_dangling_link(home):
    (home / "link").symlink_to(home / "nowhere")
    return home / "link" / "new"


def a_dangling_link(home):
    (home / "link").symlink_to(home / "nowhere")
    return home / "link"


def with_a_name_too_long(home):
    return home / ("x" * 300)


def below_what_is_read_only(home):
    # Root may write below a read-only folder, but not here.
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    return Path("/proc/new")


@pytest.mark.parametrize("name", ["import", "export", "retrofit", "save_huggingface"])
@pytest.mark.parametrize(
    "destination",
    [
        *[taken_folder, taken_file, below_a_file, below_a_dangling_link, a_dangling_link],
        *[with_a_name_too_long, below_what_is_read_only],
    ],
    ids=lambda destination: destination.__name__,
)
def test_an_impossible_destination_is_refused(llama, dense_run, tmp_path, destination, name):
    path = destination(tmp_path)
    before = snapshot(tmp_path)
    if name == "save_huggingface":
        config = small_config()
        with pytest.raises(InputError) as refusal:
            save_huggingface(path, config, random_params(config))
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    else:
        source = llama if name == "import" else dense_run
        assert_refused(command(CONVERT, name, source, path), str(path))
    assert snapshot(tmp_path) == before


def test_a_tokenizer_that_cannot_be_read_is_refused(llama, tmp_path):
    words = [CONVERT, "import", llama, tmp_path / "new", "--tokenizer"]
    assert_command_refused(tmp_path, [*words, tmp_path / "none"], tmp_path / "none")
    assert_command_refused(tmp_path, [*words, llama / MODEL], llama / MODEL)
    (llama / "tokenizer.json").write_text("{")
    assert_command_refused(tmp_path, words[:-1], llama / "tokenizer.json")


def write_tokenizer(path):
    """A tokenizer of 270 tokens at most."""
    path.write_text(train_tokenizer([SENTENCE], 270, 2).to_str(), encoding="utf-8")
    return path


def test_a_tokenizer_with_more_tokens_than_the_embeddings_is_refused(llama, tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    words = [CONVERT, "import", llama, tmp_path / "new", "--tokenizer", path]
    assert_command_refused(tmp_path, words, "67")


# Interruptions.


def failing_after_writing(error):
    """Saves the parameters as an import does, then fails."""

    def save(*arguments):
        save_params(*arguments)
        raise error

    return save


FULL = OSError(28, "No space left on device")


def test_an_import_whose_checkpoint_cannot_be_written_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(plt_jax.run, "save_params", failing_after_writing(FULL))
    words = [CONVERT, "import", llama, tmp_path / "new"]
    assert_command_refused(tmp_path, words, f"cannot write {tmp_path / 'new'}: No space left")


def test_an_import_into_an_empty_folder_leaves_it_empty(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(plt_jax.run, "save_params", failing_after_writing(FULL))
    (tmp_path / "empty").mkdir()
    assert_command_refused(tmp_path, [CONVERT, "import", llama, tmp_path / "empty"], "No space")


def test_a_failed_import_takes_the_parents_that_it_made_with_it(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(plt_jax.run, "save_params", failing_after_writing(FULL))
    words = [CONVERT, "import", llama, tmp_path / "a" / "b" / "new"]
    assert_command_refused(tmp_path, words, "No space left")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interrupted_import_leaves_nothing(llama, tmp_path, monkeypatch, error):
    monkeypatch.setattr(plt_jax.run, "save_params", failing_after_writing(error()))
    before = snapshot(tmp_path)
    with pytest.raises(error):
        command(CONVERT, "import", llama, tmp_path / "new")
    assert snapshot(tmp_path) == before


def test_a_retrofit_whose_checkpoint_cannot_be_written_leaves_nothing(
    dense_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(plt_jax.run, "save_params", failing_after_writing(FULL))
    words = [CONVERT, "retrofit", dense_run, tmp_path / "new"]
    assert_command_refused(tmp_path, words, f"cannot write {tmp_path / 'new'}: No space left")


@contextlib.contextmanager
def files_of_at_most(size):
    """Writes beyond `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_import_to_a_full_disk_leaves_nothing(llama, tmp_path):
    # In a process of its own, since orbax's threads may go on after an error.
    program = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
        f"runpy.run_module('{CONVERT}', run_name='__main__')"
    )
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, "import", str(llama), str(tmp_path / "new")],
        env=environment(JAX_ENABLE_COMPILATION_CACHE="false", PYTHONDONTWRITEBYTECODE="1"),
        **{"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 300},
    )
    assert snapshot(tmp_path) == before
    last_line = done.stderr.splitlines(keepends=True)[-1]  # behind what orbax logs
    assert_refused(Result(done.returncode, done.stdout, last_line), str(tmp_path / "new"))


def test_an_export_whose_file_cannot_be_written_leaves_nothing(tmp_path):
    config = small_config()
    params = random_params(config)
    with files_of_at_most(4096):
        assert_export_refused(tmp_path, config, params, f"cannot write {tmp_path / 'destination'}")


def test_an_export_whose_later_shard_cannot_be_written_leaves_nothing(tmp_path):
    config = small_config(vocab_size=8)
    params = random_params(config)
    with (
        files_of_at_most(1300),  # the first projection to take more is one behind attention
        pytest.raises(InputError, match="cannot write"),
    ):
        save_huggingface(tmp_path / "new", config, params, shard_bytes=1)
    assert snapshot(tmp_path) == {}


# Exports.


@pytest.mark.parametrize("scheme", ["clp", "vanilla_loop", "clp_kv_share"])
def test_a_scheme_without_a_public_type_is_refused(tmp_path, scheme):
    config = small_config(scheme)
    assert_export_refused(tmp_path, config, random_params(config), "model.loop.scheme", scheme)


def test_a_run_of_a_scheme_without_a_public_type_is_refused(tmp_path):
    run = run_of(tmp_path / "run", small_config("vanilla_loop"))
    assert_command_refused(tmp_path, [CONVERT, "export", run, tmp_path / "new"], "vanilla_loop")


@pytest.mark.parametrize(
    ("scheme", "settings", "named"),
    [
        (("no_loop", 1), {"ffn_output_norm": True}, "model.ffn_output_norm is True"),
        (("no_loop", 1), {"output_bias": True}, "model.output_bias is True"),
        (("no_loop", 1), {"qk_norm": True, "qkv_bias": True}, "model.qkv_bias is True"),
        (("no_loop", 1), {"moe": MOE}, "model.qk_norm is False"),
        (("loop_kv_share_window",), {"moe": MOE}, "loop_kv_share_window with experts"),
        (("loop_kv_share_window",), {}, "normalize_between_loops is True"),
        (("plt",), {"moe": MOE}, "model.qk_norm is False"),
        (
            ("plt",),
            {"qk_norm": True, "moe": MOE | {"renormalize": False, "routing": "softmax_then_topk"}},
            "model.moe.renormalize is False",
        ),
        (
            ("loop_kv_share_window",),
            {"normalize_between_loops": False, "gate_input": "hidden"},
            "gate_input is hidden",
        ),
    ],
)
def test_what_no_public_type_can_say_is_refused_by_field(tmp_path, scheme, settings, named):
    config = small_config(*scheme, **settings)
    assert_export_refused(tmp_path, config, random_params(config), named)


def with_layer(params, **changes):
    layers = params["layers"] | changes
    return params | {"layers": {k: v for k, v in layers.items() if v is not REMOVED}}


def test_a_parameter_of_a_wrong_shape_is_refused_with_both(tmp_path):
    config = small_config()
    params = random_params(config)
    right = params["layers"]["q"].shape
    wrong = with_layer(params, q=jnp.zeros((2, 16, 4, 6)))
    assert_export_refused(tmp_path, config, wrong, "layers.q", "(2, 16, 4, 6)", str(right))


def test_a_missing_or_extra_parameter_is_refused(tmp_path):
    config = small_config()
    params = random_params(config)
    missing, extra = with_layer(params, gate_bias=REMOVED), with_layer(params, extra=jnp.zeros(3))
    assert_export_refused(tmp_path, config, missing, "layers.gate_bias", "(2, 4)")
    assert_export_refused(tmp_path, config, extra, "layers.extra", "(3,)")
    assert_export_refused(tmp_path, config, {}, "embedding")


def test_parameters_of_another_model_are_refused(tmp_path):
    dense = random_params(small_config("no_loop", 1))
    assert_export_refused(tmp_path, small_config(), dense, "layers.gate_bias")
    three_layers = small_config(layers=3)
    params = random_params(small_config())
    assert_export_refused(tmp_path, three_layers, params, "layers.attention_norm", "(3, 16)")


@pytest.mark.parametrize("name", ["export", "retrofit"])
def test_a_source_that_is_no_run_is_refused(llama, tmp_path, name):
    new = tmp_path / "new"
    assert_command_refused(tmp_path, [CONVERT, name, tmp_path / "none", new], "does not exist")
    assert_command_refused(tmp_path, [CONVERT, name, tmp_path, new], CONFIG, "missing")
    assert_command_refused(tmp_path, [CONVERT, name, llama, new], llama, "convert import first")
    assert_command_refused(tmp_path, [CONVERT, name, llama / MODEL, new], llama / MODEL)


@pytest.mark.parametrize("name", ["export", "retrofit"])
def test_a_run_without_a_whole_checkpoint_is_refused(dense_run, tmp_path, name):
    run, words = tmp_path / "run", [CONVERT, name, tmp_path / "run", tmp_path / "new"]
    shutil.copytree(dense_run, run)
    shutil.rmtree(run / CHECKPOINTS / "0" / "params")
    assert_command_refused(tmp_path, words, run / CHECKPOINTS / "0")
    shutil.rmtree(run / CHECKPOINTS)
    assert_command_refused(tmp_path, words, run / CHECKPOINTS, "holds no checkpoint")


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "much"])
def test_an_impossible_size_of_shards_is_refused(dense_run, tmp_path, size):
    words = [CONVERT, "export", dense_run, tmp_path / "new", "--shard_gb", size]
    assert_command_refused(tmp_path, words, "shard_gb", size)


@pytest.mark.parametrize("content", ["{", "3"])
def test_a_run_whose_carried_config_is_damaged_is_refused(llama, tmp_path, content):
    carried = {"config.json": llama / "config.json"}
    run = run_of(tmp_path / "run", small_config("no_loop", 1), files=carried)
    (run / HUGGINGFACE / "config.json").write_text(content)
    words = [CONVERT, "export", run, tmp_path / "new"]
    assert_command_refused(tmp_path, words, run / HUGGINGFACE / "config.json")


# Retrofits.


def test_a_retrofit_of_a_model_that_loops_is_refused(plt_run, tmp_path):
    words = [CONVERT, "retrofit", plt_run, tmp_path / "new"]
    assert_command_refused(tmp_path, words, "already loops", "plt", "2 loops")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("loops", "0"), ("loops", "-1"), ("loops", "two"), ("window", "0")],
        *[("scheme", "no_loop"), ("scheme", "spiral"), ("gate_input", "output")],
        *[("gate_bias", "nan"), ("gate_bias", "inf"), ("hidden_scale", "nan")],
        ("embedding_scale", "inf"),
    ],
)
def test_an_impossible_retrofit_is_refused(dense_run, tmp_path, option, value):
    words = [CONVERT, "retrofit", dense_run, tmp_path / "new", f"--{option}", value]
    assert_command_refused(tmp_path, words, value)


# Training from what was converted.


@pytest.fixture
def training(tmp_path):
    """The words that train on a small corpus, by a config that leaves the model to start_from."""
    home = make_home(tmp_path / "home")
    values = tiny_values(home)
    del values["model"]
    config = write_config(tmp_path / "config.yaml", values)
    return ["train.py", config, "--run_dir", tmp_path / "run"]


@pytest.fixture
def start(tmp_path):
    """An imported model whose tokenizer is known."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    return run_of(tmp_path / "start", start_config(), tokenizer)


def start_config():
    return small_config("no_loop", 1, vocab_size=270, max_length=16)


def assert_training_refused(home, words, *parts):
    """As `assert_command_refused`, but for the cache of tokenised text."""
    before = snapshot(home)
    assert_refused(command(*words), *map(str, parts))
    shutil.rmtree(home / "home" / "cache", ignore_errors=True)
    assert snapshot(home) == before


def test_training_in_the_folder_of_an_import_is_refused(training, start, tmp_path):
    words = [*training[:2], "--run_dir", start]
    parts = [f"--run_dir {start}", "converted model", f"--start_from {start}"]
    assert_training_refused(tmp_path, words, *parts)
    assert_training_refused(tmp_path, [*words, "--start_from", start], *parts)


def test_training_from_what_is_no_run_is_refused(training, llama, tmp_path):
    words = [*training, "--start_from"]
    assert_training_refused(tmp_path, [*words, tmp_path / "none"], tmp_path / "none")
    assert_training_refused(tmp_path, [*words, llama], llama, "convert import first")


@pytest.mark.parametrize(
    ("field", "value", "found", "wanted"),
    [
        ("layers", "3", "(2, 16)", "(3, 16)"),
        ("vocab_size", "300", "(270, 16)", "(300, 16)"),
        ("loop.count", "2", None, None),
    ],
)
def test_training_from_a_model_of_another_shape_is_refused(
    training, start, tmp_path, field, value, found, wanted
):
    words = [*training, "--start_from", start, f"--model.{field}", value]
    parts = (start / CHECKPOINTS / "0", found, wanted) if found else ("loop.count is 2",)
    assert_training_refused(tmp_path, words, *parts)


def test_training_a_looped_scheme_from_a_dense_model_is_refused(training, start, tmp_path):
    loop = ["--model.loop.scheme", "plt", "--model.loop.count", "2"]
    words = [*training, "--start_from", start, *loop]
    assert_training_refused(tmp_path, words, start, "model without loops", "retrofit")


def test_training_from_a_model_without_a_tokenizer_is_refused(training, tmp_path):
    bare = run_of(tmp_path / "bare", start_config())
    words = [*training, "--start_from", bare]
    assert_training_refused(tmp_path, words, bare, "has no tokenizer", "tokenizer.path")


def test_a_small_model_without_a_tokenizer_is_refused_for_that(training, tmp_path):
    bare = run_of(tmp_path / "bare", small_config("no_loop", 1, max_length=16))
    words = [*training, "--start_from", bare]
    assert_training_refused(tmp_path, words, bare, "has no tokenizer", "tokenizer.path")


@pytest.mark.parametrize("name", ["eval.py", "plt_jax.generate"])
def test_a_model_without_a_tokenizer_cannot_be_used_on_text(tmp_path, name):
    bare = run_of(tmp_path / "bare", start_config())
    assert_command_refused(tmp_path, [name, bare], bare, "without a tokenizer", "--tokenizer FILE")
