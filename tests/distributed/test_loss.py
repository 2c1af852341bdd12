"""The loss of the head is the same on every mesh, in one block of positions and in several."""

import pytest

from tests.distributed.processes import run_worker
from tests.model.losses import MESHES

pytestmark = pytest.mark.slow(reason="a process of its own simulates eight devices")


@pytest.fixture(scope="module")
def found():
    """What tests/distributed/loss_worker.py prints."""
    return run_worker("loss_worker")


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same(found, mesh):
    for case in found["meshes"][mesh]:
        assert max(case["differences"]) < (1e-5 if case["dtype"] == "float32" else 2e-2), case


def test_the_heads_gradient_is_scattered_over_the_devices_that_hold_the_head(found):
    assert found["specs"]["all"] == ["fsdp", "tensor"]
    assert found["reduce_scatters"]["sharded parameters"]
    assert not found["reduce_scatters"]["rows"]
