"""The measures of loops on constructed cases whose answers are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax.evaluation import loop_measures as measures

RNG = np.random.default_rng(0)
T, D, N, V = 6, 8, 4, 11
STATES = jnp.asarray(RNG.normal(size=(T, D)), jnp.float32)
ALL = jnp.ones(T, bool)


def close(found, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(found), expected, atol=atol)


def test_an_identity_moves_nothing():
    close(measures.distance(STATES, STATES), np.zeros(T))
    close(measures.turn(STATES, STATES, STATES), np.zeros(T))


def test_a_step_has_its_length():
    step = np.zeros(D, np.float32)
    step[:2] = 3.0, 4.0
    close(measures.distance(STATES + step, STATES), np.full(T, 5.0))


@pytest.mark.parametrize("degrees", [0, 60, 90, 180])
def test_updates_turn_by_an_angle(degrees):
    """The second update is the first one, turned in a plane and of another length."""
    angle = np.deg2rad(degrees)
    first, second = np.zeros(D, np.float32), np.zeros(D, np.float32)
    first[0] = 2.0
    second[:2] = 3.0 * np.cos(angle), 3.0 * np.sin(angle)
    found = measures.turn(STATES + first + second, STATES + first, STATES)
    close(found, np.full(T, np.cos(angle)), atol=1e-4)


def test_states_along_one_direction_have_rank_one():
    line = RNG.normal(size=(T, 1)) * RNG.normal(size=(1, D))
    close(measures.rank_of_states(jnp.asarray(line, jnp.float32), ALL), 1.0, atol=1e-3)


def test_states_along_all_axes_have_as_many_ranks():
    axes = jnp.eye(T, D) * jnp.arange(1.0, T + 1)[:, None]  # each is divided by its size
    close(measures.rank_of_states(axes, ALL), T, atol=1e-3)
    close(measures.rank_of_states(axes, jnp.arange(T) < 3), 3, atol=1e-3)


def test_of_states_along_two_axes_the_rank_is_between():
    # Three along one axis, one along another: singular values in the ratio of the roots.
    states = jnp.eye(T, D)[jnp.array([0, 0, 0, 1, 2, 3])]
    p = np.sqrt([3.0, 1.0]) / np.sqrt([3.0, 1.0]).sum()
    rank = measures.rank_of_states(states, jnp.arange(T) < 4)
    close(rank, np.exp(-(p * np.log(p)).sum()), atol=1e-3)


def test_of_two_singular_values_the_rank_is_between():
    p = np.array([0.75, 0.25])
    close(measures.effective_rank(jnp.array([3.0, 1.0, 0.0])), np.exp(-(p * np.log(p)).sum()))


def test_the_shift_costs_the_distance_of_neighbours():
    ramp = jnp.outer(jnp.arange(T, dtype=jnp.float32), jnp.ones(D)) * 2
    close(measures.offset_cost(ramp), [0, *[2 * np.sqrt(D)] * (T - 1)])
    close(measures.offset_cost(jnp.ones((T, D))), np.zeros(T))


def test_even_attention_has_the_entropy_of_its_keys():
    causal = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    even = jnp.asarray(np.broadcast_to(causal, (N, T, T)), jnp.float32)
    close(measures.attention_entropy(even), np.log(np.arange(1, T + 1)))
    close(measures.attention_entropy(jnp.broadcast_to(jnp.eye(T), (N, T, T))), np.zeros(T))


def test_attention_that_narrows_changes_by_the_log_of_its_keys():
    causal = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    even = jnp.asarray(np.broadcast_to(causal, (N, T, T)), jnp.float32)
    own = jnp.broadcast_to(jnp.eye(T), (N, T, T))
    close(measures.attention_change(even, even), np.zeros(T))
    close(measures.attention_change(own, even), np.log(np.arange(1, T + 1)))


def test_heads_that_are_alike_and_heads_that_share_nothing():
    alike = jnp.broadcast_to(jnp.eye(T), (N, T, T))
    rank, cosine = measures.head_diversity(alike)
    close(rank, np.ones(T), atol=1e-2)
    close(cosine, np.ones(T))
    apart = jnp.stack([jnp.zeros((T, T)).at[:, head].set(1.0) for head in range(N)])
    rank, cosine = measures.head_diversity(apart)
    close(rank, np.full(T, N), atol=1e-3)
    close(cosine, np.zeros(T))
    _, alone = measures.head_diversity(apart[:1])
    close(alone, np.ones(T))


def test_predictions():
    even, sure = np.full((T, V), -np.log(V)), np.full((T, V), -60.0)
    sure[:, 3] = 0.0
    even, sure = jnp.asarray(even, jnp.float32), jnp.asarray(sure, jnp.float32)
    close(measures.entropy(even), np.full(T, np.log(V)))
    close(measures.entropy(sure), np.zeros(T))
    close(measures.output_shift(sure, sure), np.zeros(T))
    close(measures.output_shift(sure, even), np.full(T, np.log(V)))
    logs = jnp.asarray(np.tile(np.log(np.arange(1, V + 1) / 66), (T, 1)), jnp.float32)
    targets = jnp.array([10, 9, 0, 5, 10, 0])
    close(measures.rank_of_truth(logs, targets), [1, 2, 11, 6, 1, 11])
