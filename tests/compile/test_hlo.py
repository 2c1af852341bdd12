"""Reading compiled programs: how often computations run, and how large arrays are."""

import jax
import jax.numpy as jnp
import pytest

from plt_jax.compile.hlo import executions, parse_arrays, parse_program, trip_count

LOOP = """\
HloModule made, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = f32[8,128]{1,0:T(8,128)} negate(%x)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (q: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %q = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %copied = s32[]{:T(128)} copy(%start)
  %both = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) tuple(%copied, %a)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%both), condition=%condition, body=%body
  ROOT %b = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}, execution_thread="main"
"""


def times(text: str) -> dict[str, tuple[int, bool]]:
    program = parse_program(text)
    return {one.computation.name: (one.times, one.certain) for one in executions(program)}


@pytest.mark.parametrize(("start", "turns"), [("0", 12), ("2", 10)])
def test_a_loop_runs_from_its_counters_start_to_the_constant_of_its_condition(start, turns):
    assert times(LOOP.replace("START", start)) == {"main": (1, True), "body": (turns, True)}


def test_a_known_trip_count_is_taken():
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert times(text)["body"] == (7, True)


def test_a_loop_of_unknown_length_counts_once():
    text = LOOP.replace("%limit = s32[]{:T(128)} constant(12)", "%limit = s32[] parameter(1)")
    program = parse_program(text)
    main = program.computations["main"]
    assert trip_count(program, main, main.by_name["loop"]) is None
    assert times(text)["body"] == (1, True)


CONDITIONAL = """\
%short (s: f32[4]) -> f32[4] {
  ROOT %s = f32[4]{0} parameter(0)
}

%long (l: f32[4]) -> f32[4] {
  %l = f32[4]{0} parameter(0)
  %m = f32[4]{0} negate(%l)
  ROOT %n = f32[4]{0} negate(%m)
}

ENTRY %main (a: f32[4], p: pred[]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %p = pred[] parameter(1)
  ROOT %c = f32[4]{0} conditional(%p, %a, %a), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "true_computation=%long, false_computation=%short",
        "branch_computations={%long, %short}",
    ],
)
def test_only_the_shortest_branch_is_certain(branches):
    expected = {"main": (1, True), "short": (1, True), "long": (1, False)}
    assert times(CONDITIONAL.replace("BRANCHES", branches)) == expected


@pytest.mark.parametrize(
    ("shape", "size", "in_hbm"),
    [
        ("bf16[4,100]{1,0}", 800, 800),
        ("bf16[4,100]{1,0:T(8,128)(2,1)}", 800, 8 * 128 * 2),
        ("f32[100,4]{0,1:T(4,128)}", 1600, 4 * 128 * 4),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096, 0),
        ("pred[3]", 3, 3),
        ("s4[6]{0:E(4)}", 3, 3),
        ("f32[]", 4, 4),
        ("token[]", 0, 0),
        ("f8e4m3fn[16]", 16, 16),
    ],
)
def test_bytes_of_arrays(shape, size, in_hbm):
    (array,) = parse_arrays(shape)
    assert (array.bytes, array.hbm_bytes) == (size, in_hbm)


def test_a_compiled_scan_in_a_scan_runs_its_body_often():
    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=5)[0], None

    def run(x):
        return jax.lax.scan(outer, x, None, length=3)[0]

    compiled = jax.jit(run).lower(jnp.ones((64, 64))).compile()
    program = parse_program(compiled.as_text())
    assert max(one.times for one in executions(program)) == 15
