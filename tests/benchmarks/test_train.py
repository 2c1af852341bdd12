"""The training benchmark: its figures hang together, and what it refuses."""

import json

import pytest

from plt_jax.benchmarks import train
from plt_jax.errors import InputError
from tests.training.runs import tiny_values, write_config


@pytest.fixture
def config(tmp_path):
    return str(write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path)))


@pytest.mark.slow(reason="compiles every scheme")
def test_every_scheme_is_measured_with_its_ratios(config, tmp_path, capsys):
    out = tmp_path / "train.json"
    train.main([config, "--rounds", "2", "--steps", "1", "--out", str(out)])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [row["label"] for row in report["rows"]] == ["no_loop", "vanilla_loop-2", "plt-2"]
    for row in report["rows"]:
        assert len(row["seconds"]) == 2
        tokens = report["batch_size"] * report["sequence_length"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["ms"])
        assert row["state_gb"] > 0
        assert "mfu" not in row  # nobody knows this processor's peak
    plain, vanilla, plt = report["rows"]
    assert (plain["ratio_to_no_loop"], vanilla["ratio_to_vanilla"]) == (1.0, 1.0)
    assert vanilla["model_tflops"] > plain["model_tflops"]
    ratios = sorted(a / b for a, b in zip(plt["seconds"], vanilla["seconds"], strict=True))
    assert plt["ratio_to_vanilla"] == pytest.approx(sum(ratios) / 2)
    printed = capsys.readouterr().out
    assert "attention xla" in printed and "x vanilla" in printed


@pytest.mark.slow(reason="times several train steps")
def test_a_known_device_has_a_share_of_its_peak(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda kind: 1e12)
    out = tmp_path / "train.json"
    train.main([config, "--rounds", "1", "--schemes", "plt", "--out", str(out)])
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["mfu"] == pytest.approx(row["model_tflops"] / (row["ms"] / 1e3))


@pytest.mark.slow(reason="times a train step")
def test_pytorch_stands_in_the_table(config, stand_in, tmp_path, capsys):
    out = tmp_path / "train.json"
    words = ["--rounds", "2", "--steps", "3", "--schemes", "no_loop", "--torch", stand_in]
    train.main([config, *words, "--out", str(out)])
    own, *peers = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [peer["label"] for peer in peers] == ["torch llama", "torch llama, compiled"]
    for peer in peers:
        assert peer["ms"] == pytest.approx(10.0)
        assert peer["ratio_to_no_loop"] == pytest.approx(
            sum(0.01 / seconds for seconds in own["seconds"]) / 2
        )
    assert [peer["shape"]["compile"] for peer in peers] == [False, True]
    assert peers[0]["shape"]["length"] == 16
    assert "torch llama, compiled" in capsys.readouterr().out


def test_experts_have_no_peer(tmp_path):
    values = tiny_values(tmp_path)
    values["model"]["moe"] = {"experts": 4}
    path = write_config(tmp_path / "experts.yaml", values)
    with pytest.raises(InputError, match="--torch compares with a dense llama"):
        train.main([str(path), "--torch", "/bin/false"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--torch", "/bin/false"], "--torch: /bin/false did not run transformers' llama"),
        (["--schemes", "plt,loopy"], "no scheme loopy; known are no_loop"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--loops", "0"], "--loops: 0 holds a number below 1"),
        (["--mesh.tensor", "3"], "so mesh.data = -1 has no size"),
    ],
)
def test_what_cannot_be_measured_is_refused(config, words, message):
    with pytest.raises(InputError, match=message):
        train.main([config, *words])
