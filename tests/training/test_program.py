"""The train program: fresh states, shardings, and what does not divide over the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import Transformer
from plt_jax.config import RunConfig
from plt_jax.errors import InputError
from plt_jax.training.program import TrainProgram
from tests.training.test_step import build, close, make_config


def test_the_seed_decides_the_start():
    one, same, other = (build(make_config(seed=seed)).init_state() for seed in (1, 1, 2))
    close(one.params, same.params, rtol=0, atol=0)
    assert not np.array_equal(one.params["head"], other.params["head"])
    assert int(one.step) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(one.params)} == {jnp.dtype("float32")}


def test_equal_models_are_drawn_by_the_same_programs(monkeypatch):
    build(make_config()).init_params()
    traced = []
    monkeypatch.setattr(Transformer, "declare_one", lambda *given: traced.append(given))
    build(make_config(seed=1)).init_params()
    assert traced == []


def test_a_fresh_state_has_the_abstract_states_shapes_dtypes_and_shardings():
    program = build(make_config())
    state, abstract = program.init_state(), program.abstract_state
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for made, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
        assert made.sharding.is_equivalent_to(wanted.sharding, made.ndim)


def test_micro_batches_that_do_not_divide_over_the_devices_are_refused():
    config = RunConfig(training={"batch_size": 2, "accumulate": 2}, mesh={"data": 2})
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 1, 1), tuple(config.mesh.sizes()))
    with pytest.raises(InputError, match=r"training\.batch_size / 2 micro-batches = 1 does not"):
        TrainProgram.build(config, mesh)
