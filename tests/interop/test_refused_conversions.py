"""Exports, retrofits and training starts that cannot work are refused, and nothing is written."""

import shutil

import jax.numpy as jnp
import pytest

from plt_jax.data.tokenizer import HUGGINGFACE
from plt_jax.runs.names import CHECKPOINTS, CONFIG
from tests.interop.damage import (
    CONVERT,
    MODEL,
    MOE,
    REMOVED,
    assert_command_refused,
    assert_export_refused,
    make_run,
    write_tokenizer,
)
from tests.models import random_params, small_config
from tests.training.runs import (
    assert_refused,
    command,
    make_home,
    snapshot,
    tiny_values,
    write_config,
)

# Exports.


@pytest.mark.parametrize("scheme", ["clp", "clp_kv_share"])
def test_a_scheme_without_a_public_type_is_refused(tmp_path, scheme):
    config = small_config(scheme)
    assert_export_refused(tmp_path, config, random_params(config), "model.loop.scheme", scheme)


def test_a_run_of_a_scheme_without_a_public_type_is_refused(tmp_path):
    run = make_run(tmp_path / "run", small_config("clp"))
    assert_command_refused(tmp_path, [CONVERT, "export", run, tmp_path / "new"], "scheme clp")


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
        (("plt",), {"first_layer": 1}, "model.loop.first_layer is 1"),
        (("vanilla_loop",), {"exit_gate": True}, "model.attention_output_norm is False"),
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
def test_a_model_that_no_model_type_can_express_is_refused_by_field(
    tmp_path, scheme, settings, named
):
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


@pytest.mark.parametrize("name", ["export", "retrofit", "quantize"])
def test_a_source_that_is_no_run_is_refused(llama, tmp_path, name):
    new = tmp_path / "new"
    assert_command_refused(tmp_path, [CONVERT, name, tmp_path / "none", new], "does not exist")
    assert_command_refused(tmp_path, [CONVERT, name, tmp_path, new], CONFIG, "missing")
    assert_command_refused(tmp_path, [CONVERT, name, llama, new], llama, "convert import first")
    assert_command_refused(tmp_path, [CONVERT, name, llama / MODEL, new], llama / MODEL)


@pytest.mark.parametrize("name", ["export", "retrofit", "quantize"])
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
def test_a_run_whose_imported_config_is_damaged_is_refused(llama, tmp_path, content):
    imported = {"config.json": llama / "config.json"}
    run = make_run(tmp_path / "run", small_config("no_loop", 1), files=imported)
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


# Training that starts from a converted model.


@pytest.fixture
def training(tmp_path):
    """The words of a command that trains on a small corpus. Its config leaves the model to
    start_from."""
    home = make_home(tmp_path / "home")
    values = tiny_values(home)
    del values["model"]
    config = write_config(tmp_path / "config.yaml", values)
    return ["train.py", config, "--run_dir", tmp_path / "run"]


@pytest.fixture
def start(tmp_path):
    """An imported model that has a tokenizer."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    return make_run(tmp_path / "start", start_config(), tokenizer)


def start_config():
    return small_config("no_loop", 1, vocab_size=270, max_length=16)


def assert_training_refused(home, words, *parts):
    """Like `assert_command_refused`, but the command may write the cache of tokenized text."""
    before = snapshot(home)
    assert_refused(command(*words), *map(str, parts))
    shutil.rmtree(home / "home" / "cache", ignore_errors=True)
    assert snapshot(home) == before


def test_training_in_the_folder_of_an_import_is_refused(training, start, tmp_path):
    words = [*training[:2], "--run_dir", start]
    parts = [f"--run_dir {start}", "holds parameters alone", f"--start_from {start}"]
    assert_training_refused(tmp_path, words, *parts)
    assert_training_refused(tmp_path, [*words, "--start_from", start], *parts)


def test_training_from_a_folder_that_is_no_run_is_refused(training, llama, tmp_path):
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
    bare = make_run(tmp_path / "bare", start_config())
    words = [*training, "--start_from", bare]
    assert_training_refused(tmp_path, words, bare, "has no tokenizer", "tokenizer.path")


def test_a_small_model_without_a_tokenizer_is_refused_for_that(training, tmp_path):
    bare = make_run(tmp_path / "bare", small_config("no_loop", 1, max_length=16))
    words = [*training, "--start_from", bare]
    assert_training_refused(tmp_path, words, bare, "has no tokenizer", "tokenizer.path")


@pytest.mark.parametrize("name", ["eval.py", "plt_jax.generate"])
def test_a_model_without_a_tokenizer_cannot_be_used_on_text(tmp_path, name):
    bare = make_run(tmp_path / "bare", start_config())
    assert_command_refused(tmp_path, [name, bare], bare, "without a tokenizer", "--tokenizer FILE")
