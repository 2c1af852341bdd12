"""The decode benchmark: what it counts, writes and refuses. What it times is not judged here."""

import json
import sys
from pathlib import Path

import pytest

from plt_jax.benchmarks import decode
from plt_jax.errors import InputError

CONFIG = """
model: {vocab_size: 64, width: 16, layers: 1, heads: 4, kv_heads: 2, ffn_width: 32,
        loop: {window: 4}}
"""
WINDOW = 64  # of the schemes' defaults: the benchmark takes the config's shape, not its loop


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
            *("--batch", "1,2", "--context", "40,80", "--rounds", "2", "--tokens", "2"),
            *("--prompt", "24", "--out", out, "--schemes", "no_loop,vanilla_loop,plt"),
            *("--loops", "2"),
        )
    return json.loads((out / "decode.json").read_text()), out


def rows(report):
    for cell in report["cells"]:
        for row in cell["rows"]:
            yield cell, row, {row["label"]: row for row in cell["rows"]}


def test_every_cell_has_every_case(report):
    report, _ = report
    cells = [(cell["batch"], cell["context"]) for cell in report["cells"]]
    assert cells == [(1, 40), (2, 40), (1, 80), (2, 80)]
    labels = ["no_loop", "vanilla_loop-2", "plt-2"]
    assert all([row["label"] for row in cell["rows"]] == labels for cell in report["cells"])


def test_caches_grow_as_the_paper_says(report):
    """L times without sharing; (L-1)·W/S of a plain cache more with windows."""
    for cell, row, by_label in rows(report[0]):
        plain, loops = by_label["no_loop"]["kv_bytes"], row["loops"]
        if row["scheme"] == "plt":
            assert (row["kv_bytes"] - plain) * cell["capacity"] == plain * (loops - 1) * WINDOW
        else:
            assert row["kv_bytes"] == loops * plain


def test_bytes_read_in_a_step(report):
    """Weights once per pass, and no term of the shared cache that grows with the loops."""
    for _, row, by_label in rows(report[0]):
        plain, loops = by_label["no_loop"], row["loops"]
        passes = loops if row["scheme"] == "vanilla_loop" else 1
        head = 64 * 16 * 4
        layers = plain["weight_bytes_read"] - head
        gates = 0 if row["scheme"] != "plt" else (4 * 4 + 4) * 4
        assert row["weight_bytes_read"] == passes * layers + head + gates
        assert row["cache_bytes_read"] == row["kv_bytes"]


def test_ratios_are_to_the_same_rounds(report):
    for _, row, _ in rows(report[0]):
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["ratio_to_no_loop"] > 0
        assert (row["label"] == "no_loop") <= (row["ratio_to_no_loop"] == 1)
        assert ("ratio_to_vanilla" in row) == (row["loops"] > 1)
        assert row["prefill_tokens_per_second"] > 0 and row["first_token_ms"] > 0


def test_what_is_written(report):
    report, out = report
    names = {path.name for path in Path(out).iterdir()}
    assert names == {"decode.json", "decode.txt", "schemes.png", "batch.png", "context.png"}
    text = (out / "decode.txt").read_text()
    assert report["command"] in text and report["machine"]["jax"] in text
    assert text.count("plt-2") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schemes", "plt,plr"], "no scheme plr; known are no_loop"),
        (["--batch", "1,0"], "argument --batch: 1,0 holds a number below 1"),
        (["--context", "many"], "argument --context: invalid"),
        (["--tokens", "32"], "--tokens is 32; it must be 1 to 31"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--dtype", "float16"], "--dtype"),
        (["--cache_dtype", "float16"], "cache dtype is float16"),
        (["--torch", "/bin/false"], "--torch: /bin/false did not run transformers' llama"),
    ],
)
def test_bad_options_are_refused(config, monkeypatch, words, message):
    with pytest.raises(InputError, match=message):
        call(monkeypatch, config, "--schemes", "no_loop", *words)
