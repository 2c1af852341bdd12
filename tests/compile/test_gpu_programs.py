"""A GPU's programs: what is read from their text, and real compiles without a GPU, where JAX's CUDA
plugin is installed."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from plt_jax.commands.compile import main
from plt_jax.compile import program as programs
from plt_jax.compile.hlo import parse_program
from plt_jax.compile.kernels import OUTSIDE, generation_loop, read_kernels, total_traffic
from plt_jax.distributed.gpus import GPUS, names_gpus, parse_gpus
from plt_jax.errors import InputError
from tests.training.runs import REPOSITORY, environment

TEXT = (Path(__file__).parent / "generation_loop.hlo").read_text(encoding="utf-8")
"""Two products and a write, as XLA prints the compiled loop of generation; shortened by hand."""


@pytest.fixture(scope="module")
def step():
    program = parse_program(TEXT)
    assert generation_loop(program) == "body"
    return read_kernels(program, TEXT, "body")


def test_kernels_belong_to_the_layer_whose_weights_they_read(step):
    assert [(kernel.name, kernel.layer) for kernel in step] == [
        ("before", OUTSIDE),
        ("a", 0),
        ("kept", 0),
        ("b", 1),
        ("sum", 1),
        ("one", 0),  # called by the first layer
        ("two", 0),
    ]


def test_kernels_have_kinds_and_the_lines_of_their_arithmetic(step):
    kinds = {kernel.name: (kernel.kind, kernel.sources) for kernel in step}
    assert kinds["a"] == ("Triton product", ("decoding/linear.py:36 _product",))
    assert kinds["kept"] == ("XLA input", ("decoding/step.py:50 layer",))
    assert kinds["b"] == ("cublas gemm", ())
    assert kinds["before"] == ("copy", ())


def test_bytes_of_kernels(step):
    """A product reads its weights, a write in place writes its part, a workspace is not counted."""
    moved = {kernel.name: tuple(kernel.traffic) for kernel in step}
    assert moved["a"] == (2 * 8 * 2 + 4 * 8 * 2, 2 * 4 * 4)
    assert moved["kept"] == (4 + 2 * 8 * 2, 2 * 8 * 2)
    assert moved["b"] == (2 * 8 * 2 + 4 * 8 * 2, 2 * 4 * 4)
    total = total_traffic(step)
    assert total == tuple(map(sum, zip(*moved.values(), strict=True)))


def test_the_whole_program_counts_what_is_outside_the_loop(step):
    whole = read_kernels(parse_program(TEXT), TEXT)
    assert [kernel.name for kernel in whole] == ["copied", *(kernel.name for kernel in step)]


def test_topologies_of_gpus():
    assert parse_gpus("h100") == (GPUS["h100"], 1)
    assert parse_gpus("h100:8") == (GPUS["h100"], 8)
    assert names_gpus("b200:2") and not names_gpus("v5e:2x2")
    for bad in ("h100:0", "h100:2x2", "h1000"):
        with pytest.raises(InputError, match="CARD or CARD:COUNT"):
            parse_gpus(bad)


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"CUDA plugin, which is not installed; pip install"):
        main([str(REPOSITORY / "configs" / "tiny.yaml"), "--topology", "h100"])


# ---- real compiles ----

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="compiling for GPUs needs JAX's CUDA plugin: pip install 'plt_jax[gpu_compile]'",
)


def compiled(path, *words: str) -> tuple[dict, str]:
    """What the command finds, and all that it and the card's assembler say."""
    command = [sys.executable, "-m", "plt_jax.compile", *words, "--json", str(path)]
    variables = environment(JAX_DEFAULT_MATMUL_PRECISION="default", MOSAIC_GPU_DUMP_PTXAS="1")
    done = subprocess.run(
        command, **{"cwd": REPOSITORY, "env": variables, "capture_output": True, "timeout": 900}
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(path.read_text(encoding="utf-8")), (done.stdout + done.stderr).decode()


def decode_programs(path, *words: str) -> tuple[dict, str]:
    """The decode programs of four layers of a 1B model by scheme and batch, and what was said."""
    shape = ["configs/plt_dense_1b.yaml", "--topology", "h100", "--model.layers", "4", "--decode"]
    schemes = ["--context", "1024", "--schemes", "no_loop,plt", "--loops", "2,3"]
    found, said = compiled(path, *shape, *schemes, "--batch", "1,16", *words)
    return {(one["label"], one["batch"]): one for one in found["programs"]}, said


@needs_plugin
@pytest.mark.slow(reason="compiles four layers of a 1B model six times")
def test_loops_add_at_most_one_kernel_a_layer(tmp_path):
    """The bounds that this project holds to: 18 kernels a layer without loops, 1 more with PLT."""
    found, _ = decode_programs(tmp_path / "found.json")
    for batch in (1, 16):
        plain = found["no_loop", batch]
        assert plain["kernels_per_layer"] <= 18
        for label in ("plt-2", "plt-3"):
            looped = found[label, batch]
            assert looped["kernels_per_layer"] <= plain["kernels_per_layer"] + 1
            assert looped["kernels"] - plain["kernels"] <= 4 + 8  # layers, and all that is outside
            # More rows have larger logits and partial sums, which kernels hand on in memory.
            assert looped["bytes_read"] < (1.05 if batch == 1 else 1.2) * plain["bytes_read"]


@needs_plugin
@pytest.mark.slow(reason="compiles four layers of a 1B model six times")
def test_the_attention_kernel_fits_registers_and_saves_five_kernels_a_layer(tmp_path):
    mosaic = ("--model.decode_attention", "mosaic")
    found, said = decode_programs(tmp_path / "found.json", *mosaic)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == 6 and set(spills) == {("0", "0")}
    for batch in (1, 16):
        assert found["no_loop", batch]["kernels_per_layer"] <= 13
        for label in ("plt-2", "plt-3"):
            one = found[label, batch]
            kinds = [kernel["kind"] for kernel in one["middle_layer"]]
            assert kinds.count("Mosaic GPU") == 1 and len(kinds) <= 12
            # The cache is updated in place.
            assert one["bytes_written"] < 0.1 * one["bytes_read"]


@needs_plugin
@pytest.mark.slow(reason="compiles a decode step")
def test_the_attention_kernel_compiles_for_wide_heads_that_are_split_over_cards(tmp_path):
    words = ["configs/plt_dense_1b.yaml", "--topology", "h100:2", "--model.layers", "2"]
    words += ["--mesh.data", "1", "--mesh.tensor", "2", "--decode", "--context", "512"]
    words += ["--model.head_width", "128", "--model.decode_attention", "mosaic"]
    found, said = compiled(tmp_path / "found.json", *words)
    (one,) = found["programs"]
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said) == [("0", "0")]
    assert "Mosaic GPU" in [kernel["kind"] for kernel in one["middle_layer"]]


@needs_plugin
@pytest.mark.slow(reason="compiles a train step")
def test_a_train_step_compiles(tmp_path):
    words = ["configs/tiny.yaml", "--topology", "h100:2", "--mesh.data", "2"]
    (one,) = compiled(tmp_path / "found.json", *words)[0]["programs"]
    assert one["kernels"] > one["kernels_per_layer"] > 0
    assert one["context"] is None and one["bytes_written"] > 0
