"""The serving benchmark: that all requests are served, and what its report holds."""

import json
from argparse import Namespace

import pytest

from plt_jax.benchmarks import serve, serve_report
from plt_jax.benchmarks.prepared import prepare_all
from plt_jax.benchmarks.serve_clients import Load
from plt_jax.config.variants import variants_of
from tests.models import small_config


@pytest.mark.parametrize("rate", [0.0, 50.0], ids=["closed loop", "poisson"])
def test_every_request_is_served_and_timed(rate, tmp_path):
    base = small_config("plt", 2, max_length=128)
    arguments = Namespace(
        requests=5,
        prompt=(2, 20),
        output=(8, 10),
        rate=rate,
        rounds=1,
        long_prompt=30,
        prefill_tokens=16,
        cache_dtype=None,
    )
    load = Load(arguments, base.vocab_size)
    rows = prepare_all(variants_of(["plt"], [2]), base)
    (row,) = serve.measure(rows, 2, load, arguments)
    assert row["tokens_per_second"] > 0
    assert 0 < row["first_ms_50"] <= row["first_ms_99"]
    assert 0 < row["between_ms_50"] <= row["between_ms_99"]
    assert row["stall"]["ratio"] > 0
    report = {
        "command": "",
        "machine": {"device": "cpu", "processor": "", "cores": 2, "python": "", "jax": ""},
        "parameters": 1,
        "dtype": "float32",
        "requests": 5,
        "new_tokens": load.new_tokens,
        "rows": [row],
    }
    serve_report.write(report, tmp_path)
    assert json.loads((tmp_path / "serve.json").read_text())["rows"][0]["slots"] == 2
    assert "plt-2" in (tmp_path / "serve.txt").read_text()
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_a_load_is_the_same_for_every_scheme():
    arguments = Namespace(requests=7, prompt=(3, 9), output=(2, 4))
    load = Load(arguments, 31)
    one, other = load.clients(), load.clients()
    assert [client.prompt for client in one] == [client.prompt for client in other]
    assert all(3 <= len(client.prompt) <= 9 and 2 <= client.new_tokens <= 4 for client in one)
    assert load.new_tokens == sum(client.new_tokens for client in one)
    arrivals = load.arrivals(2.0)
    assert arrivals == sorted(arrivals)
