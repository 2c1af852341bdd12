"""Real compiles for TPUs that are not here; they need libtpu, and no TPU."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from tests.training.runs import REPOSITORY, environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu"
)

SMALL = {
    "model.vocab_size": 4096,
    "model.max_length": 512,
    "model.width": 512,
    "model.layers": 4,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.ffn_width": 1024,
    "training.batch_size": 32,
}
LAYER = 4 * 512**2 + 3 * 512 * 1024
"""Parameters of one of its layers' products."""
EMBEDDING = 4096 * 512


@pytest.fixture
def compiled(tmp_path):
    """What the command finds, as JSON, and prints."""

    def run(config: str, *words: str, settings: dict[str, Any] | None = None):
        options = [f"--{name}={value}" for name, value in (settings or {}).items()]
        path = tmp_path / "estimate.json"
        # The tests' own precision would make other products of the program.
        variables = environment(JAX_DEFAULT_MATMUL_PRECISION="default")
        command = [sys.executable, "-m", "plt_jax.compile", f"configs/{config}.yaml"]
        done = subprocess.run(
            [*command, *words, *options, "--json", str(path)],
            **{"cwd": REPOSITORY, "env": variables, "capture_output": True, "timeout": 900},
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b""
        return json.loads(path.read_text(encoding="utf-8")), done.stdout.decode()

    return run


def bytes_of(estimate: dict, kind: str, axes: list[str]) -> int:
    return sum(
        one["bytes"]
        for one in estimate["collectives"]
        if (one["kind"], one["axes"]) == (kind, axes) and one["certain"]
    )


def test_a_train_step_gathers_weights_and_sums_gradients(compiled):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2}
    estimate, printed = compiled(
        "plt_dense_1b", "--topology", "v5e:2x2", settings={**SMALL, **mesh}
    )
    # In bfloat16, for two loops forward and, recomputed, backward; the embedding is the head too.
    weights = 2 * (4 * 4 * LAYER + 2 * EMBEDDING)
    assert bytes_of(estimate, "all-gather", ["fsdp"]) == pytest.approx(weights, rel=0.1)
    # Summed over fsdp in bfloat16, per loop.
    gradients = 2 * (2 * 4 * LAYER + 2 * EMBEDDING)
    reduced = sum(bytes_of(estimate, kind, ["fsdp"]) for kind in ("all-reduce", "reduce-scatter"))
    assert reduced == pytest.approx(gradients, rel=0.1)
    # Their shards over data, in float32.
    shards = 4 * (4 * LAYER + EMBEDDING) / 2
    assert bytes_of(estimate, "all-reduce", ["data"]) == pytest.approx(shards, rel=0.2)
    parameters = 4 * (4 * LAYER + EMBEDDING) / 2
    assert estimate["memory"]["parts"]["parameters"] == pytest.approx(parameters, rel=0.01)
    assert estimate["fits"]
    assert "verdict: fits" in printed


def test_slices_share_gradients_over_the_network_alone(compiled):
    mesh = {"mesh.data": 2, "mesh.fsdp": 16}
    estimate, _ = compiled(
        *("plt_dense_1b", "--topology", "v5e:4x4", "--slices", "2"), settings={**SMALL, **mesh}
    )
    assert estimate["devices"] == 32
    between = [one for one in estimate["collectives"] if one["axes"] == ["slices"]]
    assert {one["kind"] for one in between} == {"all-reduce"}
    shards = 4 * (4 * LAYER + EMBEDDING) / 16
    assert sum(one["bytes"] for one in between) == pytest.approx(shards, rel=0.3)
    assert estimate["seconds"]["dcn"] > 0


def test_what_does_not_fit_is_a_verdict(compiled):
    settings = {"mesh.data": 4, "training.batch_size": 64, "model.layers": 4}
    estimate, printed = compiled("plt_dense_1b", "--topology", "v5e:2x2", settings=settings)
    assert not estimate["fits"]
    assert estimate["memory"]["needed"] > estimate["hbm_capacity"]
    assert "verdict: does not fit" in printed
    assert "hint: set training.accumulate to 2" in printed


def test_a_decode_step_reads_weights_and_cache(compiled):
    estimate, _ = compiled(
        *("plt_dense_1b", "--topology", "v5e:1x1"),
        *("--decode", "--batch", "4", "--context", "2048"),
        settings=SMALL,
    )
    parts = estimate["memory"]["parts"]
    assert parts["weights"] == pytest.approx(2 * (4 * LAYER + EMBEDDING), rel=0.01)
    cache = 2 * 2 * 4 * 4 * 4 * 2048 * 128
    assert cache <= parts["cache"] <= 1.1 * cache
    held = parts["weights"] + parts["cache"]
    # A cache this small goes into on-chip memory as a whole, and back.
    assert 0.9 * held <= estimate["hbm_bytes"] <= held + 1.1 * parts["cache"]
    assert estimate["collectives"] == []


def test_experts_exchange_rows_by_ragged_all_to_alls(compiled):
    moe = {"model.moe.experts": 8, "model.moe.experts_per_token": 2, "model.moe.expert_width": 256}
    mesh = {"mesh.data": 1, "mesh.expert": 4}
    estimate, _ = compiled(
        "plt_moe_1b_7b", "--topology", "v5e:2x2", settings={**SMALL, **moe, **mesh}
    )
    # Rows of width 512 in bfloat16, two experts a token, there and back, of two loops and four
    # layers, forward, recomputed and backward.
    rows = 2 * 512 * 2 * (32 * 512 // 4) * 2 * 2 * 4 * 3
    assert bytes_of(estimate, "ragged-all-to-all", ["expert"]) == pytest.approx(rows, rel=0.2)


def test_experts_exchange_rows_on_slices_without_ragged_transfers(compiled):
    moe = {"model.moe.experts": 8, "model.moe.experts_per_token": 2, "model.moe.expert_width": 256}
    mesh = {"mesh.data": 8, "mesh.expert": 4}
    estimate, _ = compiled(
        "plt_moe_1b_7b", "--topology", "v5e:4x8", settings={**SMALL, **moe, **mesh}
    )
    # As above, of an eighth of the tokens, with room for half as much again.
    rows = 2 * 512 * 2 * (32 * 512 // 32) * 2 * 2 * 4 * 3 * 1.5
    assert bytes_of(estimate, "all-to-all", ["expert"]) == pytest.approx(rows, rel=0.2)
    assert bytes_of(estimate, "ragged-all-to-all", ["expert"]) == 0


@pytest.mark.parametrize(
    ("config", "topology", "settings"),
    [
        ("plt_dense_1b", "v5p:4x4x4", {"mesh.data": 8, "mesh.fsdp": 8}),
        (
            *("plt_moe_1b_7b", "v5p:4x4x4"),
            {"mesh.data": 8, "mesh.expert": 8, "training.accumulate": 4},
        ),
    ],
)
def test_the_papers_models_train_on_a_slice(compiled, config, topology, settings):
    estimate, _ = compiled(config, "--topology", topology, settings=settings)
    assert estimate["fits"]
    assert estimate["mfu"]["slowest"] > 0.1


def test_policies_of_rematerialisation_trade_memory_for_arithmetic(compiled):
    words = ["--topology", "v5e:2x2", "--compare_remat"]
    found, printed = compiled("plt_dense_1b", *words, settings=SMALL)
    policies = found["by_remat"]
    assert list(policies) == ["none", "dots_and_attention", "dots", "attention", "full"]
    kept = [policies[remat]["activations"]["layers"] for remat in policies]
    assert kept == sorted(kept, reverse=True)
    executed = {remat: one["flops"]["executed"] for remat, one in policies.items()}
    assert executed["none"] == executed["dots_and_attention"] < executed["dots"] < executed["full"]
    assert executed["attention"] < executed["full"]
    assert all(f"\n{remat} " in printed for remat in policies)
