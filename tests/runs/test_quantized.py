"""Run directories whose weights are in eight bits: made, read, evaluated and decoded."""

import jax
import numpy as np
import pytest

from plt_jax import InputError, prepare_for_decode
from plt_jax.config import MeshConfig, MoEConfig
from plt_jax.decoding.quantization import dequantize_params, is_quantized, quantize_params
from plt_jax.distributed.mesh import make_mesh
from plt_jax.runs.conversion import quantize_run
from plt_jax.runs.directory import (
    find_checkpoint,
    open_for_decoding,
    open_trained,
    read_params,
)
from tests.interop.damage import (
    assert_command_refused,
    assert_same_params,
    make_run,
    write_tokenizer,
)
from tests.models import random_params, small_config
from tests.training.runs import command

MIXTURE = MoEConfig(experts=4, dense_layers=1, experts_per_token=2, expert_width=8, shared_width=8)
SETTINGS = {"vocab_size": 270, "max_length": 32}


def stored_in(run, mesh=None):
    """The parameters of a quantized run as they are stored."""
    return read_params(find_checkpoint(run), mesh, quantized=True)


def make_quantized(folder, config):
    """A run, and the same in eight bits; what was reported of it."""
    source = make_run(folder / "source", config, write_tokenizer(folder / "tokenizer.json"))
    lines = []
    quantize_run(str(source), str(folder / "rounded"), report=lines.append)
    return source, folder / "rounded", lines


@pytest.fixture(scope="module", params=[{}, {"moe": MIXTURE}, {"tied_embeddings": True}], ids=str)
def runs(request, tmp_path_factory):
    config = small_config(**SETTINGS, **request.param)
    return config, *make_quantized(tmp_path_factory.mktemp("quantized"), config)


def test_a_quantized_run_holds_the_rounded_weights(runs):
    config, source, rounded, lines = runs
    expected = quantize_params(random_params(config))
    assert_same_params(stored_in(rounded), expected)
    assert is_quantized(stored_in(rounded)["layers"]["q"])
    found = open_trained(rounded)
    assert found.tokenizer.decode(found.tokenizer.encode("peace")) == "peace"
    assert "int8" in lines[0] and str(source) in lines[0]
    assert lines[1] == f"written to {rounded}"


def test_without_asking_it_is_read_as_the_numbers_it_stands_for(runs):
    """As evaluation, export and retrofit read it."""
    config, _, rounded, _ = runs
    params = open_trained(rounded).params
    assert_same_params(params, dequantize_params(quantize_params(random_params(config))))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    # Rounding them again gives the stored numbers.
    again, stored = quantize_params(params), stored_in(rounded)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(stored), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_it_is_read_onto_a_mesh(runs):
    config, _, rounded, _ = runs
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    params = stored_in(rounded, mesh)
    assert_same_params(params, quantize_params(random_params(config)))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {mesh}


def test_a_quantized_run_and_the_option_decode_the_same(runs):
    config, source, rounded, _ = runs
    stored = prepare_for_decode(config, open_for_decoding(rounded).params)
    assert_same_params(stored, prepare_for_decode(config, stored_in(rounded)))
    at_start = prepare_for_decode(config, open_trained(source).params, "int8")
    assert_same_params(stored, at_start)


def test_quantizing_again_changes_nothing(runs, tmp_path):
    _, _, rounded, _ = runs
    quantize_run(str(rounded), str(tmp_path / "again"), report=lambda line: None)
    assert_same_params(stored_in(tmp_path / "again"), stored_in(rounded))


def test_it_takes_less_room(tmp_path):
    source, rounded, _ = make_quantized(
        tmp_path, small_config(**SETTINGS, width=128, ffn_width=256)
    )

    def size(run):
        params = run / "checkpoints/0/params"
        return sum(file.stat().st_size for file in params.rglob("*") if file.is_file())

    assert size(rounded) < 0.4 * size(source)


@pytest.mark.slow(reason="runs commands, which compile several programs")
def test_the_commands_take_it(tmp_path):
    source, rounded, _ = make_quantized(tmp_path, small_config(**SETTINGS))
    words = ["--prompt", "peace", "--max_new_tokens", "12"]
    one = command("plt_jax.generate", rounded, *words)
    other = command("plt_jax.generate", source, *words, "--weights", "int8")
    assert one.code == other.code == 0, one.err + other.err
    assert one.out == other.out
    text = tmp_path / "text.txt"
    text.write_text("the work of peace goes on", encoding="utf-8")
    found = command("eval.py", rounded, "--text", text)
    assert found.code == 0, found.err
    found = command("plt_jax.convert", "quantize", source, tmp_path / "new")
    assert found.code == 0, found.err
    assert "int8" in found.out


def test_training_does_not_start_from_it(tmp_path):
    from plt_jax.runs.configuration import load_config
    from plt_jax.training.start import check_start_from
    from tests.training.runs import make_home, tiny_values, write_config

    _, rounded, _ = make_quantized(tmp_path, small_config(**SETTINGS))
    values = tiny_values(make_home(tmp_path / "home"))
    del values["model"]
    written = write_config(tmp_path / "config.yaml", values)
    overrides = {"start_from": str(rounded), "run_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match=r"start_from.*rounded to eight bits, for decoding"):
        check_start_from(load_config(written, overrides))


def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path):
    words = ["plt_jax.generate", tmp_path / "none", "--weights", "int3"]
    assert_command_refused(tmp_path, words, "--weights", "int3")
