"""The decode benchmark: what it counts, writes and refuses. What it times is not judged here."""

import json
import sys
from pathlib import Path

import jax
import pytest

from plt_jax import init_cache, prepare_for_decode
from plt_jax.benchmarks import decode, decode_report
from plt_jax.benchmarks.decode import bytes_moved, nbytes
from plt_jax.benchmarks.prepared import random_weights, variant_weights
from plt_jax.benchmarks.rounds import interleave, ratios, spread
from plt_jax.benchmarks.torch_peer import decoding_llama
from plt_jax.config.variants import Variant, variants_of
from plt_jax.errors import InputError
from tests.models import random_params, small_config

CONFIG = """
model: {vocab_size: 64, width: 16, layers: 1, heads: 4, kv_heads: 2, ffn_width: 32,
        loop: {window: 4}}
"""
WINDOW = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("decode") / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["decode", *map(str, words)])
    decode.main()


@pytest.fixture(scope="module")
def report(config):
    """One small measurement of everything, and the folder it was written to."""
    out = config.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        call(
            patch,
            config,
            *("--batch", "1,2", "--context", "40", "--rounds", "2", "--tokens", "2"),
            *("--prompt", "24", "--out", out, "--schemes", "no_loop,vanilla_loop,plt"),
            *("--loops", "2"),
        )
    return json.loads((out / "decode.json").read_text()), out


def rows(report):
    for cell in report["cells"]:
        for row in cell["rows"]:
            yield cell, row, {row["label"]: row for row in cell["rows"]}


@pytest.mark.slow(reason="times the decoding of several models")
def test_every_cell_has_every_variant(report):
    report, _ = report
    cells = [(cell["batch"], cell["context"]) for cell in report["cells"]]
    assert cells == [(1, 40), (2, 40)]
    labels = ["no_loop", "vanilla_loop-2", "plt-2"]
    assert all([row["label"] for row in cell["rows"]] == labels for cell in report["cells"])


@pytest.mark.slow(reason="times the decoding of several models")
def test_caches_grow_as_the_paper_says(report):
    """L times without sharing; (L-1)·W/S of a plain cache more with windows."""
    for cell, row, by_label in rows(report[0]):
        plain, loops = by_label["no_loop"]["kv_bytes"], row["loops"]
        if row["scheme"] == "plt":
            assert (row["kv_bytes"] - plain) * cell["capacity"] == plain * (loops - 1) * WINDOW
        else:
            assert row["kv_bytes"] == loops * plain


@pytest.mark.slow(reason="times the decoding of several models")
def test_figures_are_of_the_rounds_and_of_each_other(report):
    report, _ = report
    for cell, row, by_label in rows(report):
        assert len(row["rounds_ms"]) == 2
        assert [row["ms_min"], row["ms_max"]] == sorted(row["rounds_ms"])
        assert row["ms"] == pytest.approx(sum(row["rounds_ms"]) / 2)
        assert row["tokens_per_second"] == pytest.approx(1000 * cell["batch"] / row["ms"])
        seconds_per_token = row["ms"] / 1000
        read = row["weight_bytes_read"] + row["cache_bytes_read"]
        assert row["gb_per_second"] == pytest.approx(read / seconds_per_token / 1e9)
        plain = by_label["no_loop"]["rounds_ms"]
        expected = [a / b for a, b in zip(row["rounds_ms"], plain, strict=True)]
        assert row["ratio_to_no_loop"] == pytest.approx(sum(expected) / 2)
        assert ("ratio_to_vanilla" in row) == (row["loops"] > 1)
        prefill_seconds = row["first_token_ms"] / 1000
        assert row["prefill_tokens_per_second"] == pytest.approx(
            24 * cell["batch"] / prefill_seconds
        )


@pytest.mark.slow(reason="times the decoding of several models")
def test_what_is_written(report):
    report, out = report
    names = {path.name for path in Path(out).iterdir()}
    assert names == {"decode.json", "decode.txt", "schemes.png", "batch.png"}
    text = (out / "decode.txt").read_text()
    assert report["command"] in text and report["machine"]["jax"] in text
    assert text.count("plt-2") == 2


@pytest.mark.slow(reason="times the decoding of several models")
def test_contexts_and_loops_are_drawn_where_there_are_several(report, tmp_path):
    report, _ = report
    (first, _), three_loops = report["cells"], report["cells"][0]["rows"][-1] | {"loops": 3}
    first = first | {"rows": [*first["rows"], three_loops]}
    decode_report.write(report | {"cells": [first, first | {"context": 80}]}, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"decode.json", "decode.txt", "schemes.png", "context.png", "loops.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schemes", "plt,plr"], "no scheme plr; known are no_loop"),
        (["--batch", "1,0"], "argument --batch: 1,0 holds a number below 1"),
        (["--context", "many"], "argument --context: many is not a list of numbers, as 1,2,3"),
        (["--tokens", "32"], "--tokens is 32; it must be 1 to 31"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--looped_layers", "two"], "argument --looped_layers: invalid layer_range value: 'two'"),
        (
            ["--schemes", "plt", "--looped_layers", "0-1"],
            r"plt-2-layers_0_to_1: .* must be layers of the model, 0 to 0",
        ),
        (["--cache_dtype", "float16"], "argument --cache_dtype: invalid choice"),
        (["--torch", "/bin/false"], "--torch: /bin/false did not run transformers' llama"),
    ],
)
def test_bad_options_are_refused(config, monkeypatch, words, message):
    with pytest.raises(InputError, match=message):
        call(monkeypatch, config, "--schemes", "no_loop", *words)


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("scheme", "passes", "caches", "cache_passes"),
    [
        ("no_loop", 1, 1, 1),
        ("vanilla_loop", 3, 3, 1),
        ("clp", 1, 3, 1),
        ("clp_kv_share", 1, 1, 1),
        ("plt", 1, 1, 1),
        ("loop_kv_share_window", 3, 1, 3),
    ],
)
def test_bytes_read_in_a_step(scheme, passes, caches, cache_passes):
    """Weights once per pass; all slots once in one pass, whatever the loops."""
    config = small_config(scheme, 1 if scheme == "no_loop" else 3, window=5)
    weights = prepare_for_decode(config, random_params(config))
    moved = bytes_moved(config, weights, init_cache(config, 2, 32))
    plain = 2 * 2 * 2 * 2 * 32 * 4 * 4  # keys and values, layers, B, K, S, H, bytes
    gated = scheme in ("plt", "loop_kv_share_window")
    windows = plain * 2 * 5 // 32 if gated else 0
    assert moved["cache_bytes_read"] == (plain * caches + windows) * cache_passes
    layer = 16 + 16 + 32 * 16 + 16 * 16 + 48 * 16 + 16 * 24 + (4 * 4 + 4 if gated else 0)
    assert moved["weight_bytes_read"] == 4 * (passes * 2 * layer + 31 * 16)


@pytest.mark.parametrize(("scheme", "passes"), [("vanilla_loop", 3), ("plt", 1)])
def test_layers_that_do_not_loop_are_read_once(scheme, passes):
    config = small_config(scheme, 3, window=5, layers=4, first_layer=1, last_layer=1)
    weights = prepare_for_decode(config, random_params(config))
    moved = bytes_moved(config, weights, init_cache(config, 2, 32))
    plain = 2 * 2 * 2 * 32 * 4 * 4  # keys and values of a layer, B, K, S, H, bytes
    looped = plain + plain * 2 * 5 // 32 if scheme == "plt" else 3 * plain
    assert moved["cache_bytes_read"] == 3 * plain + looped
    layer = 16 + 16 + 32 * 16 + 16 * 16 + 48 * 16 + 16 * 24
    gate = 4 * 4 + 4 if scheme == "plt" else 0
    assert moved["weight_bytes_read"] == 4 * (3 * layer + passes * (layer + gate) + 31 * 16)


def test_a_variant_loops_other_layers():
    base = small_config("plt", 2, layers=6)
    found = variants_of(["no_loop", "plt"], [2, 3], looped=(2, 3))
    names = ["no_loop", "plt-2", "plt-2-layers_2_to_3", "plt-3", "plt-3-layers_2_to_3"]
    assert [variant.label for variant in found] == names
    looped = [variant.apply(base).looped_layers for variant in found]
    assert looped == [range(6), range(6), range(2, 4), range(6), range(2, 4)]
    weights = random_weights(found[0].apply(base))
    assert variant_weights(found[2].apply(base), weights).loop_norm is weights.final_norm


@pytest.mark.parametrize(
    ("batch", "share"), [(1, 1 - (7 / 8) ** 2), (3, 1 - (7 / 8) ** 6), (33, 1 - (7 / 8) ** 66)]
)
def test_experts_count_as_they_are_read(batch, share):
    """Two rows a sequence, each of 2 of 16 experts."""
    moe = {"experts": 16, "experts_per_token": 2, "expert_width": 8}
    config = small_config("plt", 2, moe=moe)
    weights = prepare_for_decode(config, random_params(config))
    moved = bytes_moved(config, weights, init_cache(config, batch, 8))
    experts = 2 * 3 * 16 * 16 * 8 * 4
    others = nbytes(weights) - nbytes((weights.embedding, weights.final_norm)) - experts
    assert moved["weight_bytes_read"] == pytest.approx(others + share * experts, abs=1)


def test_rounds_begin_in_turn_after_one_that_does_not_count():
    calls = []

    def timer(name):
        return lambda: calls.append(name) or len(calls)

    seconds = interleave({name: timer(name) for name in "abc"}, 4)
    assert "".join(calls) == "abcabcbcacababc"
    assert seconds == {"a": [4, 9, 11, 13], "b": [5, 7, 12, 14], "c": [6, 8, 10, 15]}


def test_ratios_pair_rounds():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert spread("x", [3.0, 1.0, 8.0]) == {"x": 3.0, "x_min": 1.0, "x_max": 8.0}


def test_a_variant_keeps_the_configs_window_and_gates():
    config = small_config("plt", 2, window=7, gate_input="hidden")
    loop = Variant("loop_kv_share_window", 3).apply(config).loop
    assert (loop.scheme, loop.count, loop.window, loop.gate_input) == (
        "loop_kv_share_window",
        3,
        7,
        "hidden",
    )


# ---- PyTorch beside it ----


def test_the_peer_has_the_models_shape_and_answers_each_question(stand_in):
    config = small_config("plt", 2)
    peer = decoding_llama(stand_in, config, batch=3, context=50, compiled=True)
    shape = peer.about["shape"]
    for name in ("width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "vocab_size"):
        assert shape[name] == getattr(config, name)
    assert (shape["batch"], shape["context"], shape["capacity"]) == (3, 50, 82)
    assert (shape["compile"], shape["device"]) == (True, jax.default_backend())
    assert [peer(7), peer(3)] == [0.07, 0.03]
    peer.stop()
    assert peer.process.returncode == 0


@pytest.mark.slow(reason="times the decoding of several models")
def test_peers_stand_in_the_table(config, stand_in, monkeypatch, capsys, tmp_path):
    words = ["--schemes", "no_loop", "--context", "8", "--rounds", "2", "--tokens", "4"]
    call(monkeypatch, config, *words, "--torch", stand_in, "--out", tmp_path / "out")
    peers = json.loads((tmp_path / "out" / "decode.json").read_text())["cells"][0]["peers"]
    assert [peer["ms"] for peer in peers] == [pytest.approx(10.0)] * 2
    assert "torch llama, compiled" in capsys.readouterr().out


def test_experts_have_no_peer(tmp_path, stand_in, monkeypatch):
    path = tmp_path / "experts.yaml"
    path.write_text("model: {width: 16, heads: 4, moe: {experts: 4}}")
    with pytest.raises(InputError, match="--torch compares with a dense llama"):
        call(monkeypatch, path, "--torch", stand_in)
