"""Attention and shift over sequences that several devices hold give what one device gives."""

import pytest

from tests.distributed.context_worker import CASES, MESHES
from tests.distributed.processes import run_worker

pytestmark = pytest.mark.slow(reason="a process of its own simulates eight devices")


@pytest.fixture(scope="module")
def found():
    """What tests/distributed/context_worker.py prints."""
    return run_worker("context_worker")


@pytest.mark.parametrize("mesh", MESHES)
def test_outputs_and_gradients_are_those_of_one_device(found, mesh):
    differences = found[mesh]
    assert len(differences) > len(CASES)
    assert differences.pop("shift") == 0.0
    for case, difference in differences.items():
        assert difference < 2e-5, case
