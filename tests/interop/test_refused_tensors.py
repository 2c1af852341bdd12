"""Tensors, files and indexes that are wrong or damaged are refused, and nothing is written."""

import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from plt_jax import InputError, load_huggingface, save_huggingface
from tests.interop.damage import (
    CASES,
    CONVERT,
    EMBEDDING,
    FIRST,
    HEAD,
    INDEX,
    MODEL,
    MOE,
    REMOVED,
    SECOND,
    Q,
    assert_command_refused,
    assert_import_refused,
    assert_same_params,
    change_config,
    change_index,
    change_tensors,
    read_config,
    saved_model,
    write_index,
    zeros,
)
from tests.training.runs import (
    snapshot,
)

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


def test_a_rope_scaling_without_a_type_is_refused(llama):
    change_config(llama, rope_parameters=REMOVED, rope_scaling={"factor": 4.0})
    assert_import_refused(llama, llama / "config.json", "rope_scaling has a factor")


def test_more_layers_than_tensors_are_refused_at_once(llama):
    change_config(llama, num_hidden_layers=10**9)
    assert_import_refused(llama, llama / "config.json", "1000000000 layers")


def test_a_link_as_the_destination_is_refused(llama, tmp_path):
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
    assert_import_refused(llama, llama / MODEL, "not a complete safetensors file", "download it")


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
    assert_import_refused(llama, llama / MODEL, "not a complete safetensors file")


def test_a_folder_in_the_place_of_a_file_is_refused(llama):
    (llama / MODEL).unlink()
    (llama / MODEL).mkdir()
    assert_import_refused(llama, llama / MODEL)


@pytest.mark.parametrize("length", [0, 100, 2000])
def test_a_truncated_shard_is_refused(sharded, length):
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:length])
    assert_import_refused(sharded, sharded / SECOND, "not a complete safetensors file")


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
