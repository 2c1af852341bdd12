"""An export and an import, in either order, give the same configuration, names and bytes."""

import filecmp
import json
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from plt_jax import ModelConfig, load_huggingface, save_huggingface
from plt_jax.interop import checkpoint_reader
from plt_jax.model.transformer import abstract_params
from tests.golden.huggingface import GOLDEN
from tests.golden.test_looped_types import NANBEIGE, OURO
from tests.golden.test_model import DENSE, TRANSFORMERS
from tests.golden.test_reference import CASES
from tests.interop.checkpoints import exportable_configs
from tests.models import random_params

DTYPES = ("float32", "bfloat16", "float16")


def params_of(config: ModelConfig, dtype: str, seed: int):
    """Random parameters as numpy arrays, so that nothing is compiled."""
    random = np.random.default_rng(seed)
    shapes = nn.unbox(abstract_params(config))
    return jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(jnp.dtype(dtype)), shapes
    )


def assert_same(one, other):
    """Asserts that two trees are equal bit for bit, with the same dtypes."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.slow(reason="compiles a program for every example")
@settings(max_examples=12)
@given(exportable_configs(), st.sampled_from(DTYPES), st.integers(1, 2000))
def test_an_export_that_is_imported_is_exported_again_unchanged(config, dtype, shard_bytes):
    params = params_of(config, dtype, seed=shard_bytes)
    with tempfile.TemporaryDirectory() as home:
        first, second = Path(home) / "first", Path(home) / "second"
        save_huggingface(first, config, params, shard_bytes=shard_bytes)
        read_config, read_params = load_huggingface(first)
        computes = "bfloat16" if dtype == "bfloat16" else "float32"
        assert read_config == config.model_copy(update={"dtype": computes})
        assert_same(read_params, params)
        save_huggingface(second, read_config, read_params, shard_bytes=shard_bytes)
        names = sorted(file.name for file in first.iterdir())
        assert names == sorted(file.name for file in second.iterdir())
        assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


PUBLISHED = [
    *(GOLDEN / name for name in CASES),
    *(TRANSFORMERS / name for name in DENSE),
    *(*NANBEIGE, *OURO),
]
OTHERWISE = {
    "mistral": {"model_type", "architectures"},  # the same model as a llama
    "nanbeige_loss_weights": {"num_loops"},  # its weights' number says it
}
"""The keys that an export writes otherwise."""


@pytest.fixture(params=PUBLISHED, ids=lambda folder: folder.name)
def published(request):
    """The folder of each checkpoint that other programs wrote."""
    return request.param


def test_an_imported_checkpoint_is_exported_unchanged(published, tmp_path):
    config, params = load_huggingface(published)
    save_huggingface(tmp_path / "out", config, params)
    name = "model.safetensors"
    if published in NANBEIGE:  # the header that mlx writes has another order
        assert_same(load_file(tmp_path / "out" / name), load_file(published / name))
    else:
        assert filecmp.cmp(published / name, tmp_path / "out" / name, shallow=False)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path / "out")
    )
    theta = (before.get("rope_parameters") or before)["rope_theta"]
    assert after["rope_theta"] == theta
    otherwise = {"rope_scaling"} | OTHERWISE.get(published.name, set())
    for key in after.keys() & before.keys() - otherwise:
        assert after[key] == before[key], key


@pytest.mark.slow(reason="writes and reads every golden case")
def test_bfloat16_and_back_is_exact(published, tmp_path):
    """A checkpoint stored in bfloat16, read as float32, is written in bfloat16 unchanged."""
    config, params = load_huggingface(published, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    save_huggingface(tmp_path / "half", config, params)
    wide_config, wide = load_huggingface(tmp_path / "half", dtype="float32")
    assert wide_config.dtype == "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    save_huggingface(tmp_path / "again", wide_config, wide, dtype="bfloat16")
    name = "model.safetensors"
    assert filecmp.cmp(tmp_path / "half" / name, tmp_path / "again" / name, shallow=False)


def test_shards_keep_their_size_limit_and_the_index_names_all_tensors(tmp_path):
    config, params = load_huggingface(TRANSFORMERS / "qwen3_biases")
    save_huggingface(tmp_path / "out", config, params, shard_bytes=20000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [f.name for f in files] == [
        f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for file in files:
        with safe_open(file, "numpy") as tensors:
            names = tensors.keys()
            sizes = {name: tensors.get_tensor(name).nbytes for name in names}
            assert tensors.metadata() == {"format": "pt"}
        assert sum(sizes.values()) <= 20000 or len(sizes) == 1
        held |= dict.fromkeys(sizes, file.name)
        assert not held.keys() - index["weight_map"].keys()
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_tensors_of_several_dtypes_are_read_into_the_widest(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "mixed"
    config, params = load_huggingface(TRANSFORMERS / "llama", dtype="bfloat16")
    save_huggingface(folder, config, params)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, mixed = load_huggingface(folder)
    assert mixed["layers"]["attention_norm"].dtype == jnp.float32
    assert mixed["layers"]["q"].dtype == jnp.bfloat16
    assert_same(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), mixed), params)


def test_gates_with_their_older_name_are_read(tmp_path):
    """Older checkpoints call the gates `loop_gate_proj` instead of `plt_gate`."""
    from safetensors.numpy import load_file, save_file

    from tests.models import small_config

    config = small_config("plt", 2, gate_input="hidden")
    params = random_params(config)
    save_huggingface(tmp_path / "now", config, params)
    tensors = load_file(tmp_path / "now" / "model.safetensors")
    older = {name.replace("plt_gate", "loop_gate_proj"): x for name, x in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, tmp_path / "now" / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_huggingface(tmp_path / "now")[1], params)


def test_one_loop_without_gates_is_a_plain_model(tmp_path):
    from safetensors.numpy import load_file, save_file

    from tests.models import forward, random_tokens, small_config

    config = small_config("plt", 1)
    params = random_params(config)
    save_huggingface(tmp_path / "one", config, params)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    plain = {name: x for name, x in tensors.items() if "plt_gate" not in name}
    save_file(plain, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    read, read_params = load_huggingface(tmp_path / "one")
    assert read.loop.scheme == "no_loop"
    tokens = random_tokens(config, 1, 8)
    np.testing.assert_array_equal(
        forward(read)(read_params, tokens), forward(config)(params, tokens)
    )


def test_devices_with_memory_of_their_own_get_the_same_layer_by_layer(monkeypatch):
    expected, params = load_huggingface(TRANSFORMERS / "llama")
    monkeypatch.setattr(checkpoint_reader, "_share_the_hosts_memory", lambda mesh: False)
    made, shapes = checkpoint_reader.HostShards, []

    def noted(shape, *others):
        shapes.append(shape)
        return made(shape, *others)

    monkeypatch.setattr(checkpoint_reader, "HostShards", noted)
    config, read = load_huggingface(TRANSFORMERS / "llama")
    assert config == expected
    assert_same(read, params)
    stacked = {leaf.shape for leaf in jax.tree.leaves(params["layers"])}
    assert shapes and not stacked & set(shapes)


def test_parameters_that_share_the_readers_memory_can_be_donated():
    _, params = load_huggingface(TRANSFORMERS / "llama")
    shards = checkpoint_reader.HostShards((3, 4), np.dtype("float32"), params["head"].sharding)
    ((_, values),) = shards.parts.items()
    values[...] = np.arange(12).reshape(3, 4)
    array = shards.to_array()
    assert np.shares_memory(np.asarray(array), values)
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(array)
    np.testing.assert_array_equal(doubled, 2 * np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(values, np.arange(12).reshape(3, 4))
