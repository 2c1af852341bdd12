"""Decoding with a cache that several devices share gives the forward pass's logits."""

import pytest

from plt_jax.config import SCHEMES
from tests.distributed.decode_worker import CASES
from tests.distributed.processes import run_worker

pytestmark = pytest.mark.slow(reason="a process of its own simulates eight devices")


@pytest.fixture(scope="module")
def found():
    """What tests/distributed/decode_worker.py prints."""
    return run_worker("decode_worker")


@pytest.mark.parametrize("case", CASES)
def test_a_split_cache_gives_the_forward_logits(found, case):
    mesh, _, split = CASES[case]
    got = found["plt"][case]
    assert got["difference"] < 1e-4
    assert got["made"] == got["kept"] == split
    # Nothing as large as the part of the cache that one device holds is gathered.
    assert got["largest gather"] < got["part"]
    width = mesh.get("tensor", 1) * mesh.get("context", 1) * mesh.get("fsdp", 1)
    assert got["wide weight"] == [[16, 24 // width]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_decodes_over_all_axes(found, scheme):
    assert found["schemes"][scheme]["difference"] < 1e-4


def test_loops_over_part_of_the_stack_decode_over_all_axes(found):
    assert {got["difference"] < 1e-4 for got in found["of the middle"].values()} == {True}


def test_heads_are_normed_together_over_all_axes(found):
    assert found["norm over heads"]["difference"] < 1e-4


def test_eight_bits_split_too(found):
    assert found["int8"]["made"] == [2, 2, 3]
    assert found["int8"]["difference"] < 0.1


def test_a_checkpoint_in_eight_bits_is_read_onto_a_mesh(found):
    assert found["read"]["equal"]
    # Two layers; the inputs are split over two devices, and each has all scales of the outputs.
    assert found["read"]["shards"] == [[2, 12, 16], [2, 1, 16]]


def test_weights_in_eight_bits_split_too(found):
    got = found["int8 weights"]
    assert got["difference"] < 1e-3
    # The scales, one for each output, are whole where the inputs are split.
    assert got["wide weight"] == [[16, 24 // 4], [16, 1]]


@pytest.mark.parametrize("case", [0, 1], ids=["float32", "int8"])
def test_several_devices_serve_what_one_generates(found, case):
    got = found["served"][case]
    assert got["served"] == got["alone"]
    assert got["compiled"] == []
    assert got["compiled alone"]  # so the count counts


def test_the_same_tokens_are_drawn(found):
    alone, together = found["generated"]
    assert alone == together


@pytest.mark.parametrize("gate_input", ["query", "hidden"])
def test_the_attention_kernel_is_given_what_each_device_holds(found, gate_input):
    """In plain JAX instead of the kernel itself; bfloat16."""
    assert 0 < found["fused"][gate_input] < 0.1
