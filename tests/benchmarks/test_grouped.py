"""The benchmark of grouped products: what it runs, counts and refuses."""

import json
import sys

import jax
import pytest

from benchmarks import grouped
from plt_jax.errors import InputError


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["grouped", *words])
        grouped.main()
        return capsys.readouterr().out

    return run


SIZES = ["--tokens", "24", "--experts", "2,3", "--widths", "4", "--outputs", "4", "--rounds", "2"]


def test_every_kernel_is_measured_forward_and_backward(run, tmp_path):
    out = run(*SIZES, "--out", str(tmp_path / "grouped.json"))
    assert len(out.splitlines()) == 2 + 4
    report = json.loads((tmp_path / "grouped.json").read_text())
    assert [cell["experts"] for cell in report["cells"]] == [2, 2, 3, 3]
    for cell in report["cells"]:
        assert cell["rows"] == 48
        assert cell["largest_group"] >= 48 / cell["experts"]
        for kernel in grouped.kernels_here():
            assert (
                0
                < cell[kernel]["gflops_min"]
                <= cell[kernel]["gflops"]
                <= cell[kernel]["gflops_max"]
            )


def test_a_backward_pass_counts_three_products(monkeypatch):
    """Where every measurement takes a nanosecond."""
    monkeypatch.setattr(grouped, "interleave", lambda timers, _: {name: [1e-9] for name in timers})
    kernels = {"dense": grouped.dense}
    forward, both = (
        grouped.measure(kernels, (8, 2, 4, 5), "float32", backward, 1)["dense"]["gflops"]
        for backward in (False, True)
    )
    assert (forward, both) == (pytest.approx(2 * 8 * 4 * 5), pytest.approx(3 * 2 * 8 * 4 * 5))


def test_kernels_are_measured_where_they_run(monkeypatch):
    assert set(grouped.kernels_here()) == {"dense", "ragged_dot", "blocks"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "megablox" in grouped.kernels_here()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--per_token", "4", "--experts", "8,3"], "--per_token 4 is above --experts 3"),
        (["--rounds", "0"], "--per_token, --outputs and --rounds must be at least 1"),
        (["--tokens", "0"], "--tokens: 0 holds a number below 1"),
    ],
)
def test_bad_input_is_refused(run, words, message):
    with pytest.raises(InputError, match=message):
        run(*words)
