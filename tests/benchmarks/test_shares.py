"""The benchmark of the memory that processes need beside their share of a model."""

import json
from unittest import mock

import pytest

from benchmarks import shares
from plt_jax.errors import InputError
from plt_jax.model.costs import count_parameters


@pytest.mark.parametrize("gigabytes", [0.3, 1.0])
def test_the_model_has_the_size_that_was_asked_for(gigabytes, tmp_path):
    model = shares.config_of(gigabytes, 512, tmp_path).model
    assert 4 * count_parameters(model).total == pytest.approx(gigabytes * 1e9, rel=0.05)


def test_an_unknown_use_is_refused():
    with mock.patch("sys.argv", ["shares", "--uses", "read,train"]), pytest.raises(InputError):
        shares.main()


@pytest.mark.slow(reason="starts two processes")
def test_each_process_holds_half_of_a_small_model(tmp_path, capsys, monkeypatch):
    # This process has one device, and so the checkpoint that it makes has one shard.
    monkeypatch.setattr(shares, "make_run", made_on_one_device)
    out = tmp_path / "shares.json"
    words = ["shares", "--gigabytes", "0.01", "--width", "128", "--uses", "read", "--out", str(out)]
    with mock.patch("sys.argv", words):
        shares.main()
    rows = json.loads(out.read_text())
    half = 2 * count_parameters(shares.config_of(0.01, 128, tmp_path).model).total / 1e6
    for row in rows:
        # Norms are whole on every device.
        assert row["share"] == pytest.approx(half, rel=0.05)
        assert row["peak"] > row["share"]
    assert "read, process 1" in capsys.readouterr().out


def made_on_one_device(config, text) -> None:
    from plt_jax.data.synthetic_examples import byte_tokenizer
    from plt_jax.runs.directory import create_run
    from tests.models import random_params

    create_run(config, random_params(config.model), byte_tokenizer(config), {})
    text.write_text("a text", encoding="utf-8")
