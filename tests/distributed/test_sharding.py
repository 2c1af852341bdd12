"""Eight devices give what one gives, with the parameters laid out by the rules."""

import math

import jax
import numpy as np
import pytest

from plt_jax.config import MeshConfig
from plt_jax.distributed.mesh import make_mesh
from plt_jax.errors import InputError
from plt_jax.evaluation.scores import evaluate_trained
from plt_jax.runs.configuration import load_config
from plt_jax.runs.directory import open_trained
from plt_jax.training import trainer
from tests.distributed.processes import run_worker
from tests.distributed.worker import MESHES, SHAPE
from tests.training.runs import STEPS, flat, losses

pytestmark = pytest.mark.slow(reason="a process of its own simulates eight devices")

CASES = [mesh for mesh in MESHES if mesh != "one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def found(folder):
    """What tests/distributed/worker.py prints."""
    found = run_worker("worker", folder)
    assert found["devices"] == 8
    return found


@pytest.mark.parametrize("mesh", CASES)
def test_every_mesh_gives_the_losses_of_one_device(found, mesh):
    case = found["meshes"][mesh]
    for got, expected in zip(case["metrics"], case["expected"], strict=True):
        assert flat(got) == pytest.approx(flat(expected), rel=1e-5)
    assert case["expected"][0]["loss"] != case["expected"][1]["loss"]


@pytest.mark.parametrize("mesh", CASES)
def test_every_mesh_gives_the_updates_of_one_device(found, mesh):
    case = found["meshes"][mesh]
    for name, difference in case["differences"].items():
        assert difference < 2e-6, name
        assert case["moved"][name] > 1e-4, name


def test_loops_over_part_of_the_stack_with_losses_at_all_of_them(found):
    case = found["middle"]
    for got, expected in zip(case["metrics"], case["expected"], strict=True):
        assert flat(got) == pytest.approx(flat(expected), rel=1e-5)
    assert len(case["expected"][0]["loss_by_loop"]) == 2
    for name, difference in case["differences"].items():
        assert difference < 2e-6, name
        assert case["moved"][name] > 1e-4, name


def test_muon_updates_sharded_matrices_as_whole_ones(found):
    case = found["muon"]
    for got, expected in zip(case["metrics"], case["expected"], strict=True):
        assert flat(got) == pytest.approx(flat(expected), rel=1e-4)
    for name, difference in case["differences"].items():
        # Its iteration multiplies small singular values, and with them rounding, by some 500.
        assert difference < 1e-4, name
        assert case["moved"][name] > 1e-4, name


def test_a_checkpoint_is_read_onto_a_mesh_and_written_from_it(found):
    case = found["imported"]
    assert case["files"] > 5
    assert case["different_files"] == []
    assert case["misplaced"] == []
    assert set(case["differences"].values()) == {0.0}


AXES = {
    "embedding": ("tensor", "fsdp"),
    "final_norm": ("fsdp",),
    "head": ("fsdp", "tensor"),
    "layers.attention_norm": (None, "fsdp"),
    "layers.ffn_norm": (None, "fsdp"),
    "layers.q": (None, "fsdp", "tensor", None),
    "layers.k": (None, "fsdp", "tensor", None),
    "layers.v": (None, "fsdp", "tensor", None),
    "layers.q_norm": (None, None),
    "layers.k_norm": (None, None),
    "layers.o": (None, "tensor", None, "fsdp"),
    "layers.gate_bias": (None, "tensor"),
    "layers.gate_weight": (None, "tensor", None),
    "layers.ffn_gate": (None, "fsdp", "tensor"),
    "layers.ffn_up": (None, "fsdp", "tensor"),
    "layers.ffn_down": (None, "tensor", "fsdp"),
}
V, D, N, K, F = (SHAPE[name] for name in ("vocab_size", "width", "heads", "kv_heads", "ffn_width"))
H = D // N
SHAPES = {
    "embedding": (V, D),
    "final_norm": (D,),
    "head": (D, V),
    "layers.attention_norm": (1, D),
    "layers.ffn_norm": (1, D),
    "layers.q": (1, D, N, H),
    "layers.k": (1, D, K, H),
    "layers.v": (1, D, K, H),
    "layers.q_norm": (1, H),
    "layers.k_norm": (1, H),
    "layers.o": (1, N, H, D),
    "layers.gate_bias": (1, N),
    "layers.gate_weight": (1, N, H),
    "layers.ffn_gate": (1, D, F),
    "layers.ffn_up": (1, D, F),
    "layers.ffn_down": (1, F, D),
}


@pytest.mark.parametrize("mesh", CASES)
def test_parameters_and_moments_lie_as_the_rules_say(found, mesh):
    sizes = {"tensor": 1, "fsdp": 1} | MESHES[mesh]
    shards = found["meshes"][mesh]["shards"]
    seen = 0
    for leaf, (shard, devices) in shards.items():
        name = next((name for name in AXES if leaf.endswith(f".{name}")), None)
        if name is None:
            assert shard == [], leaf
            continue
        expected = [
            size // sizes.get(axis, 1) for size, axis in zip(SHAPES[name], AXES[name], strict=True)
        ]
        assert shard == expected, leaf
        assert devices == math.prod(MESHES[mesh].values()), leaf
        seen += 1
    # The parameters, and Adam's two running means of each.
    assert seen == 3 * len(AXES)


REFUSED = {
    "more devices": ["need 16 devices, but there are 8", "set one axis to -1"],
    "fewer devices": ["need 4 devices, but there are 8"],
    "no size": ["8 devices do not divide by mesh.tensor 3 = 3", "mesh.data = -1"],
    "kv_heads": ["layers.k has a dimension of 2", "mesh axis tensor = 4"],
    "heads": ["has a dimension of 2", "mesh axis tensor = 4"],
    "width": ["has a dimension of 20", "mesh axis fsdp = 8"],
    "vocabulary": ["has a dimension of 63", "mesh axis tensor = 2"],
    "micro-batch": ["training.batch_size / 4 micro-batches = 4 does not divide by the 8 dev"],
    "batch": ["training.batch_size = 12 does not divide by the 8 devices of mesh axes data x fsdp"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_divide_is_refused(found, case):
    message = found["refusals"][case]
    for part in REFUSED[case]:
        assert part in message
    assert "change" in message and "\n" not in message


def test_a_refused_parameter_is_named_as_in_the_model(found):
    for case in ("kv_heads", "heads", "width", "vocabulary"):
        assert found["refusals"][case].split()[0].removeprefix("params.") in AXES


def test_without_devices_to_fill_the_mesh_it_is_refused():
    with pytest.raises(InputError, match="need 2 devices, but there are 1; change a size, or set"):
        make_mesh(MeshConfig(data=2), jax.devices()[:1])
    assert make_mesh(MeshConfig(), jax.devices()[:1]).shape == dict.fromkeys(
        ("data", "fsdp", "expert", "context", "tensor"), 1
    )


def test_a_run_trained_on_eight_devices_opens_on_one(found, folder):
    assert found["trained"]["step"] == STEPS
    for name, step in (("stopped", 4), ("run", STEPS)):
        trained = open_trained(folder / name)
        assert trained.step == step
        assert trained.config.mesh.sizes() == MESHES["all"] | {"expert": 1, "context": 1}
        for leaf in jax.tree.leaves(trained.params):
            assert len(leaf.sharding.device_set) == 1
            assert np.isfinite(leaf).all()


def test_a_run_evaluates_the_same_on_eight_devices_and_on_one(found, folder):
    numbers = evaluate_trained(str(folder / "stopped")).numbers
    for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes"):
        assert numbers[name] == pytest.approx(found["trained"]["evaluation"][name], rel=1e-5)


def test_a_run_trained_on_eight_devices_resumes_on_one(found, folder):
    eight = load_config(folder / "run" / "config.yaml")
    mesh = MeshConfig().model_dump()
    config = load_config(
        folder / "stopped" / "config.yaml", {"mesh": mesh, "run_dir": str(folder / "stopped")}
    )
    before = losses(config)
    assert trainer.train(config) == trainer.Outcome(STEPS, stopped=False)
    after = losses(config)
    assert list(after) == list(range(1, STEPS + 1))
    assert {step: after[step] for step in before} == before
    assert after == pytest.approx(losses(eight), rel=1e-5)


def test_initialising_a_large_model_takes_little_more_memory_than_it():
    """0.65 billion parameters; simulated devices keep them in the host's memory."""
    found = run_worker("memory_worker", optimized=True)
    assert found["devices"] == 8 and found["parameters"] > 2.5e9
    assert found["peak"] < 1.5 * found["parameters"]
