"""Bytes through main memory, of programs whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest

from plt_jax.compile.hlo import parse_program
from plt_jax.compile.traffic import hbm_bytes

N = 4096
F32 = 4


def moved(function, *shapes, **options) -> int:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hbm_bytes(parse_program(jax.jit(function, **options).lower(*arrays).compile().as_text()))


def test_elementwise_arithmetic_reads_and_writes_once():
    assert moved(lambda x: jnp.sin(x) * 2 + x, (N, N)) == 2 * N * N * F32


def test_a_sum_of_two_reads_both():
    assert moved(lambda x, y: x + y, (N,), (N,)) == 3 * N * F32


def test_a_loop_reads_a_slice_of_stacked_weights_per_turn():
    """Ten layers: all weights once, the state in and out of every layer."""

    def layer(x, w):
        return x + jnp.sin(w), None

    total = moved(lambda x, ws: jax.lax.scan(layer, x, ws)[0], (N,), (10, N))
    at_least = (10 + 20) * N * F32
    # The compiler copies the state and keeps counters; never does it read the whole stack per turn.
    assert at_least <= total <= 1.2 * at_least + 4 * N * F32


def test_an_update_in_place_writes_its_part():
    def update(x, part):
        return jax.lax.dynamic_update_slice(x, part, (7, 0))

    assert moved(update, (N, N), (1, N), donate_argnums=0) == pytest.approx(2 * N * F32, rel=0.01)


TPU = """\
%fused (p: bf16[16,8,128], i: s32[]) -> bf16[8,128] {
  %p = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %slice = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p, %i, %i, %i)
  ROOT %flat = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

ENTRY %main (w: bf16[16,8,128], i: s32[]) -> bf16[8,128] {
  %w = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused
  %double = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} add(%near, %near)
  %away = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) copy-start(%double)
  ROOT %there = bf16[8,128]{1,0:T(8,128)(2,1)} copy-done(%away)
}
"""


def test_arrays_in_on_chip_memory_are_free():
    """A slice is read from main memory, doubled on the chip, and copied back."""
    assert hbm_bytes(parse_program(TPU)) == 2 * 8 * 128 * 2


def tpu_line(line: str) -> int:
    text = f"""\
ENTRY %main (w: bf16[64,128]) -> bf16[16,128] {{
  %w = bf16[64,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %n = bf16[16,128]{{1,0:T(8,128)(2,1)S(1)}} constant(0)
  %i = s32[]{{:T(128)S(6)}} constant(0)
{line}
}}
"""
    return hbm_bytes(parse_program(text))


PART = 16 * 128 * 2


@pytest.mark.parametrize(
    ("line", "size"),
    [
        # Prefetches of a part of an array into on-chip memory, and the same into main memory.
        (
            "  %s = ((bf16[64,128]{1,0:T(8,128)(2,1)}), bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]"
            "{:S(2)}) slice-start(%w), slice={[0:16], [0:128]}",
            PART,
        ),
        ("  %s = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice(%w), slice={[0:16], [0:128]}", PART),
        ("  %s = bf16[16,128]{1,0:T(8,128)(2,1)} slice(%w), slice={[0:16], [0:128]}", 2 * PART),
        ("  %s = bf16[64,128]{1,0:T(8,128)(2,1)} dynamic-update-slice(%w, %n, %i, %i)", PART),
        ("  %s = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%n, %i, %i)", 0),
    ],
)
def test_of_a_slice_its_part_moves(line, size):
    assert tpu_line(line) == size


KERNEL = """\
ENTRY %main (rows: f32[8,128], keys: f32[64,128]) -> (f32[8,128], f32[64,128]) {
  %rows = f32[8,128]{1,0} parameter(0)
  %keys = f32[64,128]{1,0} parameter(1)
  ROOT %out = (f32[8,128]{1,0}, f32[64,128]{1,0}) custom-call(%rows, %keys), OPTIONS
}
"""


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ('custom_call_target="k"', 8 + 64),
        ('custom_call_target="k", output_to_operand_aliasing={{1}: (1, {})}', 8),
    ],
)
def test_what_a_kernel_updates_in_place_is_read_alone(options, written):
    program = parse_program(KERNEL.replace("OPTIONS", options))
    assert hbm_bytes(program) == (8 + 64 + written) * 128 * F32
