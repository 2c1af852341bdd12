"""Experts on several devices give what one device gives."""

import math

import pytest

from tests.distributed.experts_worker import EXCHANGES, MESHES
from tests.distributed.processes import run_worker

pytestmark = pytest.mark.slow(reason="a process of its own simulates eight devices")


@pytest.fixture(scope="module")
def found():
    """What tests/distributed/experts_worker.py prints."""
    return run_worker("experts_worker")


@pytest.mark.parametrize("mesh", MESHES)
def test_training_gives_the_losses_and_router_statistics_of_one_device(found, mesh):
    case = found["train"][mesh]
    for got, expected in zip(case["metrics"], case["expected"], strict=True):
        assert got.keys() == expected.keys()
        assert got["expert_dropped"] == 0.0
        for name, value in expected.items():
            # Means per loop and layer are lists of lists.
            pairs = zip(flat(got[name]), flat(value), strict=True)
            assert all(one == pytest.approx(other, rel=1e-5) for one, other in pairs), name
    assert case["expected"][0]["loss"] != case["expected"][1]["loss"]


def flat(value) -> list[float]:
    return [one for part in value for one in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("mesh", MESHES)
def test_training_gives_the_updates_of_one_device(found, mesh):
    case = found["train"][mesh]
    for name, difference in case["differences"].items():
        assert difference < 2e-6, name
        assert case["moved"][name] > 1e-4, name


@pytest.mark.parametrize("mesh", MESHES)
def test_experts_lie_on_their_devices(found, mesh):
    sizes = {"fsdp": 1, "tensor": 1} | MESHES[mesh]
    layers, experts, width, hidden = found["train"][mesh]["shape"]
    assert found["train"][mesh]["shard"] == [
        layers,
        experts // sizes["expert"],
        width // sizes["fsdp"],
        hidden // sizes["tensor"],
    ]


@pytest.mark.parametrize("mesh", EXCHANGES)
@pytest.mark.parametrize("transfers", ["dense", "ragged"])
def test_no_load_loses_a_row_or_changes_a_gradient(found, transfers, mesh):
    """All tokens choose the same two experts: their devices need several rounds to take them."""
    case = dict(found[transfers][mesh])
    assert case.pop("dropped") == 0.0
    assert case.pop("load of two experts") == 1.0
    assert case.pop("rounds") > 1
    for name, difference in case.items():
        assert difference < 2e-6, name


@pytest.mark.parametrize("mesh", MESHES)
def test_decoding_with_experts_on_their_devices_gives_the_forward_logits(found, mesh):
    case = found["decode"][mesh]
    assert case["difference"] < 1e-4
    experts = 8 // MESHES[mesh]["expert"]
    assert case["shard"][0] == experts
    # Rows are gathered, weights never.
    assert case["largest gather"] < math.prod(case["shard"])


def test_experts_in_eight_bits_lie_on_their_devices_too(found):
    case = found["int8 weights"]
    assert case["difference"] < 1e-3
    assert case["shard"][0] == 4
    assert case["largest gather"] < math.prod(case["shard"])


def test_what_does_not_divide_is_refused(found):
    refused = found["refusals"]["experts"]
    assert refused.startswith("params.layers.expert_down has a dimension of 12")
    assert "does not divide by mesh axis expert = 8; change" in refused
    refused = found["refusals"]["batch"]
    assert refused.startswith("a batch of 3 does not divide by the 8 devices of mesh axes data x")
