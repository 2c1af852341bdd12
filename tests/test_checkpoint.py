"""Checkpoints: what is kept, and that reading gives back exactly what was saved."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plt_jax.checkpoint import Checkpoints, load_params
from plt_jax.config import CheckpointConfig
from plt_jax.errors import InputError
from plt_jax.run_files import list_steps

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def batches():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SHARDING), tree
    )


def make_params(value: float = 0.0):
    return {
        "norm": jnp.linspace(-1.0, 1.0, 7) / 3 + value,
        "layers": {
            "q": jax.random.normal(jax.random.key(3), (2, 3, 4)),
            "half": jnp.arange(5, dtype=jnp.bfloat16) / 7,
        },
    }


def make_optimizer_state(params):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, state = optimizer.update(params, optimizer.init(params), params)
    return {"step": jnp.asarray(5, jnp.int32), "opt_state": state}


def save_losses(directory, config, losses):
    """Saves checkpoints 1, 2, ... with these validation losses."""
    with Checkpoints(directory, config) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(step, {"x": jnp.full(3, step)}, {"y": jnp.ones(2)}, batches(), loss)


def assert_same(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("keep", "keep_best", "losses", "expected"),
    [
        (1, 0, [3.0, 1.0, 2.0], [3]),
        (2, 0, [3.0, 1.0, 2.0, 4.0], [3, 4]),
        (1, 1, [3.0, 1.0, 2.0, 2.5], [2, 4]),
        (1, 1, [3.0, 2.0, 1.0], [3]),
        (1, 2, [5.0, 1.0, 4.0, 2.0, 3.0, 6.0], [2, 4, 6]),
        (2, 1, [1.0, 5.0, 4.0, 3.0, 2.0], [1, 4, 5]),
        (1, 1, [None, 2.0, None, 3.0, None], [2, 5]),
        (2, 1, [None, None, None], [2, 3]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, keep_best, losses, expected):
    save_losses(tmp_path, CheckpointConfig(keep=keep, keep_best=keep_best), losses)
    assert list_steps(tmp_path) == expected


def test_the_best_is_remembered_over_a_restart(tmp_path):
    config = CheckpointConfig(keep=1, keep_best=1)
    save_losses(tmp_path, config, [1.0, 2.0])
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.latest_step == 2
        checkpoints.save(3, {"x": jnp.ones(3)}, {"y": jnp.ones(2)}, batches(), 3.0)
    assert list_steps(tmp_path) == [1, 3]


def test_what_is_restored_is_what_was_saved(tmp_path):
    params, data = make_params(), batches()
    optimizer = make_optimizer_state(params)
    for _ in range(4):
        next(data)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(5, params, optimizer, data, 1.5)
    expected = [next(data) for _ in range(3)]
    assert expected[0] == 4
    again = batches()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest_step == 5
        *restored, state = checkpoints.restore(abstract(params), abstract(optimizer))
        again.set_state(state)
    assert_same(tuple(restored), (params, optimizer))
    assert [next(again) for _ in range(3)] == expected


def test_the_newest_is_restored(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        for step in (1, 2, 10):
            params = make_params(step)
            checkpoints.save(step, params, make_optimizer_state(params), batches())
    optimizer = abstract(make_optimizer_state(params))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored, _, _ = checkpoints.restore(abstract(params), optimizer)
    assert_same(restored, make_params(10))


def test_saving_copies_at_once(tmp_path):
    # The train step donates its state, so the buffers are gone when the writing happens.
    params, data = make_params(), batches()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, params, {"y": jnp.ones(2)}, data)
        next(data)
        for leaf in jax.tree.leaves(params):
            leaf.delete()
    assert_same(load_params(tmp_path, 1, abstract(make_params())), make_params())


def test_parameters_are_read_alone(tmp_path):
    params = make_params()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, params, make_optimizer_state(params), batches())
    assert_same(load_params(tmp_path, 3, abstract(params)), params)
    assert_same(load_params(str(tmp_path), 3, abstract(params)), params)


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    save_losses(tmp_path, CheckpointConfig(keep=5), [3.0, 2.0])
    # Orbax writes under a name of this form, then renames.
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert list_steps(tmp_path) == [1]
    with Checkpoints(tmp_path, CheckpointConfig(keep=5)) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(2, {"x": jnp.full(3, 7)}, {"y": jnp.ones(2)}, batches(), 1.0)
    assert list_steps(tmp_path) == [1, 2]
    assert_same(load_params(tmp_path, 2, {"x": abstract(jnp.full(3, 7))}), {"x": jnp.full(3, 7)})


def test_steps_are_sorted_as_numbers(tmp_path):
    for name in ("10", "9", "100", "notes", "9.tmp"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [9, 10, 100]
    assert list_steps(tmp_path / "none") == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tree: tree | {"norm": jnp.zeros(8)}, id="shape"),
        pytest.param(lambda tree: tree | {"more": jnp.zeros(8)}, id="missing"),
        pytest.param(lambda tree: {"norm": tree["norm"]}, id="extra"),
    ],
)
def test_other_parameters_are_refused_in_one_line(tmp_path, change):
    params = make_params()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, params, make_optimizer_state(params), batches())
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*3") as refusal:
        load_params(tmp_path, 3, abstract(change(params)))
    assert "\n" not in str(refusal.value)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*3"):
        load_params(tmp_path, 3, abstract(make_params()))
