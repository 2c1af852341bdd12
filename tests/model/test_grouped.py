"""Grouped products against a loop over groups in float64, forward and backward."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.config import MoEConfig
from plt_jax.errors import InputError
from plt_jax.model import grouped
from plt_jax.model.grouped import KERNELS, blocks, choose_kernel, megablox, ragged_dot

has_tokamax = importlib.util.find_spec("tokamax") is not None


def reference(rows, weight, sizes, cotangent):
    """The product [M, N], and the gradients of rows and weight under a cotangent [M, N]."""
    out = np.zeros((len(rows), weight.shape[2]))
    grad_rows, grad_weight = np.zeros_like(rows), np.zeros_like(weight)
    start = 0
    for group, size in enumerate(sizes):
        part = slice(start, start + size)
        out[part] = rows[part] @ weight[group]
        grad_rows[part] = cotangent[part] @ weight[group].T
        grad_weight[group] = rows[part].T @ cotangent[part]
        start += size
    return out, grad_rows, grad_weight


def check(product, rows, groups, inputs, outputs, sizes, outputs_first, seed, atol=1e-4):
    random = np.random.default_rng(seed)
    x, w, c = (
        random.normal(size=shape)
        for shape in ((rows, inputs), (groups, inputs, outputs), (rows, outputs))
    )
    expected, grad_x, grad_w = reference(x, w, sizes, c)
    if outputs_first:
        w, grad_w = w.swapaxes(1, 2), grad_w.swapaxes(1, 2)
    x, w, c = (jnp.asarray(array, jnp.float32) for array in (x, w, c))
    sizes = jnp.asarray(sizes, jnp.int32)
    out, pull = jax.vjp(lambda x, w: product(x, w, sizes, outputs_first), x, w)
    for got, want in zip((out, *pull(c)), (expected, grad_x, grad_w), strict=True):
        np.testing.assert_allclose(got, want, atol=atol, rtol=atol)


@st.composite
def groupings(draw):
    """Rows, and sizes of groups: empty ones, one that has all, rows behind the last."""
    groups = draw(st.sampled_from([1, 2, 6]))
    sizes = draw(st.lists(st.integers(0, 90), min_size=groups, max_size=groups))
    if draw(st.booleans()):
        keep = draw(st.integers(0, groups - 1))
        sizes = [size if index == keep else 0 for index, size in enumerate(sizes)]
    # Few numbers of rows, since each is compiled.
    rows = next(rows for rows in (7, 40, 130, 260, 540) if rows >= sum(sizes))
    return draw(st.sampled_from([rows, max(1, sum(sizes))])), sizes


@pytest.mark.slow(reason="compiles a program for every example")
@settings(max_examples=20, derandomize=True)
@given(groupings(), st.booleans(), st.integers(0, 99))
def test_blocks_are_the_product_of_each_group(grouping, outputs_first, seed):
    rows, sizes = grouping
    check(blocks, rows, len(sizes), 5, 3, sizes, outputs_first, seed)


CASES = {
    "uneven": (130, [70, 0, 3, 57]),
    "one has all": (40, [0, 40, 0]),
    "rows behind the last": (150, [20, 0, 60]),
}


@pytest.mark.slow(reason="compiles every form for every case")
@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["ragged_dot", "megablox", "tokamax"])
def test_other_forms_are_the_product_of_each_group(name, case, outputs_first):
    if name == "tokamax" and not has_tokamax:
        pytest.skip("tokamax is not installed: pip install 'plt_jax[tokamax]'")
    interpreted = functools.partial(megablox, interpret=True)
    product = {"megablox": interpreted}.get(name, KERNELS[name])
    rows, sizes = CASES[case]
    check(product, rows, len(sizes), 8, 6, sizes, outputs_first, 0)


def test_sums_are_float32_for_bfloat16_rows():
    random = np.random.default_rng(0)
    x, w = (
        jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in ((64, 96), (2, 96, 8))
    )
    sizes = jnp.array([40, 24], jnp.int32)
    out = blocks(x, w, sizes)
    assert out.dtype == jnp.bfloat16
    exact = ragged_dot(x.astype(jnp.float32), w.astype(jnp.float32), sizes)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("platform", "installed", "expected"),
    [
        ("cpu", True, "blocks"),
        ("tpu", True, "megablox"),
        ("gpu", True, "tokamax"),
        ("gpu", False, "blocks"),
    ],
)
def test_auto_is_what_the_devices_run(monkeypatch, platform, installed, expected):
    monkeypatch.setattr(grouped, "traced_platform", lambda: platform)
    monkeypatch.setattr(grouped.importlib.util, "find_spec", lambda name: installed or None)
    assert choose_kernel(MoEConfig(experts=2)) == expected
    assert choose_kernel(MoEConfig(experts=2, grouped_product="ragged_dot")) == "ragged_dot"


def test_what_the_devices_do_not_run_is_refused(monkeypatch):
    monkeypatch.setattr(grouped.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(grouped, "traced_platform", lambda: "gpu")
    with pytest.raises(InputError, match=r"grouped_product is megablox, which needs a TPU; set"):
        choose_kernel(MoEConfig(experts=2, grouped_product="megablox"))
    with pytest.raises(
        InputError, match=r"tokamax, which needs a GPU and the package \(pip install"
    ):
        choose_kernel(MoEConfig(experts=2, grouped_product="tokamax"))
