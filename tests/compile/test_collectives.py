"""Collectives read off compiled programs: kinds, counts, bytes and mesh axes."""

import json
import subprocess
import sys

import pytest

from plt_jax.compile.collectives import axes_between, first_group, read_collectives
from plt_jax.compile.hlo import parse_program
from tests.training.runs import REPOSITORY, environment, simulated


@pytest.fixture(scope="module")
def on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile.cpu_worker"],
        **{
            "cwd": REPOSITORY,
            "env": environment(**simulated(8)),
            "capture_output": True,
            "timeout": 300,
        },
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.slow(reason="a process of its own simulates eight devices")
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("gathers in a loop", ["all-gather", ["fsdp"], 6, 6 * 32 * 32 * 4]),
        ("all-to-all", ["all-to-all", ["fsdp"], 1, 8 * 8 * 4]),
        ("sum", ["all-reduce", ["data"], 1, 8 * 8 * 4]),
        ("permutation", ["collective-permute", ["fsdp"], 1, 4 * 8 * 4]),
    ],
)
def test_compiled_programs_have_the_collectives_that_were_asked_for(
    on_eight_devices, case, expected
):
    (found,) = on_eight_devices[case]
    # jax 0.10's XLA gathers over both axes what it has first split over both.
    found[1] = ["fsdp"] if found[1] == ["data", "fsdp"] else found[1]
    assert found == expected


@pytest.mark.parametrize(
    ("attributes", "group", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", (0, 1, 2, 3), ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4), ("data",)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3), ("fsdp",)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, x", (0, 4), ("data",)),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}, x",
            (0, 1, 4, 5),
            ("data", "fsdp"),
        ),
        ("source_target_pairs={{0,0},{1,5},{5,1}}, x", (1, 5), ("data",)),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, x", (0, 1, 2, 3), ("fsdp",)),
    ],
)
def test_groups_in_every_form_are_told_by_mesh_axis(attributes, group, axes):
    assert first_group(attributes) == group
    assert axes_between(group, {"data": 2, "fsdp": 4}) == axes


def test_without_groups_all_devices_take_part():
    assert first_group("channel_id=1, to_apply=%add") is None
    (found,) = read("  ROOT %r = f32[16]{0} all-reduce(%a), channel_id=1, to_apply=%add", 8)
    assert found.group == tuple(range(8))


def read(line: str, devices: int = 8, before: str = ""):
    text = f"""\
{before}
ENTRY %main (a: f32[16]) -> f32[16] {{
  %a = f32[16]{{0}} parameter(0)
{line}
}}
"""
    return read_collectives(parse_program(text), devices)


def test_an_asynchronous_collective_counts_once():
    (found,) = read("""\
  %s = (f32[16]{0}, f32[64]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = f32[64]{0} all-gather-done(%s)""")
    assert (found.kind, found.count, found.bytes) == ("all-gather", 1, 256)


CHAIN = """\
%begin (p: f32[16]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  ROOT %g1 = f32[64]{0} all-gather(%p), replica_groups={{0,1}}, frontend_attributes={chain_id="3"}
}

%end (q: f32[16]) -> f32[64] {
  %q = f32[16]{0} parameter(0)
  ROOT %g2 = f32[64]{0} all-gather(%q), replica_groups={{0,1}}, frontend_attributes={chain_id="3"}
}
"""


def test_a_collective_spread_over_fusions_counts_once():
    lines = """\
  %f = f32[64]{0} fusion(%a), kind=kCustom, calls=%begin
  ROOT %h = f32[64]{0} fusion(%a), kind=kCustom, calls=%end"""
    (found,) = read(lines, before=CHAIN)
    assert (found.kind, found.count, found.bytes) == ("all-gather", 1, 256)


def test_a_collective_of_the_sparse_cores_counts():
    before = """\
%offloaded (p: f32[16]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%p), replica_groups={{0,1,2,3}}
}, execution_thread="sparsecore"
"""
    lines = """\
  %s = ((), (), (s32[8]{0})) custom-call-start(%a), called_computations={%offloaded}
  ROOT %d = f32[64]{0} custom-call-done(%s)"""
    (found,) = read(lines, before=before)
    assert (found.kind, found.count, found.bytes) == ("all-gather", 1, 256)


def test_a_sum_of_own_parts_is_a_gather():
    (found,) = read("""\
  %z = f32[64]{0} broadcast(%c), dimensions={}
  %u = f32[64]{0} dynamic-update-slice(%z, %a, %i)
  %b = f32[64]{0} bitcast(%u)
  ROOT %r = (f32[64]{0}, f32[16]{0}) all-reduce(%b, %a), replica_groups={{0,1}}, to_apply=%add""")
    assert (found.kind, found.bytes, found.gathered_bytes) == ("all-reduce", 320, 256)


def test_what_slices_exchange_is_told_apart():
    (found,) = read(
        "  %s = (f32[16]{0}, u32[], token[]) send(%a, %t), is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  ROOT %d = token[] send-done(%s)"
    )
    assert (found.kind, found.slices, found.count, found.bytes) == ("all-reduce", 2, 1, 64)


def test_of_a_ragged_all_to_all_what_can_be_sent_counts():
    (found,) = read(
        "  %o = f32[24]{0} broadcast(%z), dimensions={}\n"
        "  ROOT %r = f32[24]{0} ragged-all-to-all(%a, %o, %i, %i, %i, %i), replica_groups={{0,1}}"
    )
    assert (found.kind, found.bytes) == ("ragged-all-to-all", 64)
