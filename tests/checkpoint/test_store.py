"""Checkpoints: what is kept, and that reading gives back exactly what was saved."""

import contextlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from plt_jax.checkpoint import byte_limits, orbax_settings
from plt_jax.checkpoint.damage import refuse_damaged
from plt_jax.checkpoint.manifest import find_damage
from plt_jax.checkpoint.params import load_params, stored_params
from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import Checkpoints
from plt_jax.config import CheckpointConfig
from plt_jax.errors import FailedError, InputError
from tests.checkpoint.damage import files_of, flip_bit, save_steps

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
        checkpoints.save(3, {"x": jnp.ones(3)}, {"y": jnp.ones(2)}, batches(), 3.0)
    assert list_steps(tmp_path) == [1, 3]


def test_what_is_restored_is_what_was_saved(tmp_path):
    params, data = make_params(), batches()
    optimizer = make_optimizer_state(params)
    for _ in range(4):
        next(data)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(5, params, optimizer, data, 1.5)
    expected = [next(data) for _ in range(3)]
    assert expected[0] == 4
    again = batches()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        *restored, state = checkpoints.restore(5, abstract(params), abstract(optimizer))
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
        restored, _, _ = checkpoints.restore(10, abstract(params), optimizer)
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
        assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()
        checkpoints.save(2, {"x": jnp.full(3, 7)}, {"y": jnp.ones(2)}, batches(), 1.0)
    assert list_steps(tmp_path) == [1, 2]
    assert_same(load_params(tmp_path, 2, {"x": abstract(jnp.full(3, 7))}), {"x": jnp.full(3, 7)})


def test_steps_are_sorted_as_numbers(tmp_path):
    for name in ("10", "9", "100", "notes", "9.tmp"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [9, 10, 100]
    assert list_steps(tmp_path / "none") == []


def test_multiples_are_kept(tmp_path):
    config = CheckpointConfig(keep=1, keep_best=0, keep_every=3)
    save_losses(tmp_path, config, [1.0] * 8)
    assert list_steps(tmp_path) == [3, 6, 8]


def test_a_save_of_a_step_that_is_there_fails_and_leaves_it(tmp_path):
    save_steps(tmp_path, 1, 2)
    with pytest.raises(FailedError, match=r"cannot save the checkpoint .*2: "):
        save_steps(tmp_path, 2)
    assert list_steps(tmp_path) == [1, 2]
    assert find_damage(tmp_path / "2") == []


def save_as_earlier(directory, losses):
    """Saves as the versions did that left checkpoints' names and metrics to orbax."""
    with ocp.training.Checkpointer(directory) as checkpointer:
        for step, loss in enumerate(losses, start=1):
            params = make_params(step)
            trees = {"params": params, "optimizer": make_optimizer_state(params)}
            metrics = {"validation_loss": loss}
            data = {"data": {"next_index": step}}
            checkpointer.save_checkpointables(step, trees | data, metrics=metrics, force=True)


def test_checkpoints_of_earlier_versions_are_read_and_their_losses_remembered(tmp_path, capsys):
    save_as_earlier(tmp_path, [1.0, 2.0])
    params, optimizer = make_params(2), make_optimizer_state(make_params(2))
    refuse_damaged(tmp_path, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the checkpoint {tmp_path / '2'} has no checksums")
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=1)) as checkpoints:
        *restored, data = checkpoints.restore(2, abstract(params), abstract(optimizer))
        checkpoints.save(3, params, optimizer, {"next_index": 3}, 3.0)
    assert_same(tuple(restored), (params, optimizer))
    assert data == {"next_index": 2}
    assert list_steps(tmp_path) == [1, 3]


@settings(max_examples=40, deadline=None)
@given(which=st.integers(0, 10**6), position=st.integers(0, 10**6), remove=st.booleans())
def test_what_nobody_verified_is_read_or_refused_in_one_line(saved, which, position, remove):
    """Orbax's own errors are many."""
    directory, params, optimizer = saved
    name = files_of(directory / "5")[which % len(files_of(directory / "5"))]
    path = directory / "5" / name
    before = path.read_bytes()
    try:
        if remove or not before:
            path.unlink()
        else:
            flip_bit(path, position, position % 8)
        with (
            contextlib.suppress(InputError),
            Checkpoints(directory, CheckpointConfig()) as checkpoints,
        ):
            checkpoints.restore(5, abstract(params), abstract(optimizer))
        with contextlib.suppress(InputError):
            load_params(directory, 5, abstract(params))
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    params = make_params()
    optimizer = make_optimizer_state(params)
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        checkpoints.save(5, params, optimizer, {"next_index": 5})
    return directory, params, optimizer


def test_parameters_are_read_where_the_optimizer_is_damaged(tmp_path):
    save_steps(tmp_path, 5)
    (tmp_path / "5" / "optimizer" / "_METADATA").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        refuse_damaged(tmp_path, 5)
    refuse_damaged(tmp_path, 5, ["params"])
    read = load_params(tmp_path, 5, {"x": abstract(jnp.zeros(3))})
    assert np.array_equal(read["x"], [5, 5, 5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_are_read_into_another_dtype(saved, dtype):
    directory, params, _ = saved
    read = load_params(directory, 5, abstract(params), dtype=dtype)
    assert_same(read, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def test_large_arrays_are_stored_in_pieces_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_settings, "CHUNK_BYTES", 2**20)
    params = {"x": jnp.zeros((2, 1024, 640))}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, params, {"step": jnp.ones(2)}, batches())
    found = stored_params(tmp_path, 1)["x"].storage_metadata.chunk_shape
    assert 4 * np.prod(found) <= 2**20
    assert all(size % piece == 0 for size, piece in zip((2, 1024, 640), found, strict=True))
    # Zeros would be next to nothing if they were compressed.
    assert (
        sum((tmp_path / "1" / name).stat().st_size for name in files_of(tmp_path / "1"))
        > params["x"].nbytes
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_arrays_above_the_limit_are_read_and_written_one_at_a_time(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(byte_limits, "CONCURRENT_BYTES", 1)
    params = {"half": jnp.arange(64, dtype=jnp.bfloat16) / 7}
    optimizer = make_optimizer_state(params)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, params, optimizer, {"position": 3})
        checkpoints.wait()
        restored = checkpoints.restore(3, abstract(params), abstract(optimizer))
    assert_same(restored[0], params)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored[1], optimizer))
    read = load_params(tmp_path, 3, abstract(params), dtype=dtype)
    assert_same(read, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


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
