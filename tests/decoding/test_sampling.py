"""Which tokens may be drawn, and how often they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plt_jax import InputError, Sampling
from plt_jax.decoding.sampling import RowSampling, penalize, restrict, sample, sample_rows

V = 8
quickly = settings(max_examples=15, derandomize=True)

# Logits without ties, in any order; some are far from the others.
distinct_logits = st.lists(st.integers(-40, 40), min_size=V, max_size=V, unique=True).map(
    lambda values: np.array(values, np.float32) / 4
)


@jax.jit
def restricted_by(logits_BV, top_k_B, top_p_B, min_p_B):
    return restrict(logits_BV, top_k_B, top_p_B, min_p_B)


def restricted_rows(logits_BV, samplings, min_p=0.0):
    top_k_B = np.array([sampling.top_k for sampling in samplings], np.int32)
    top_p_B = np.array([sampling.top_p for sampling in samplings], np.float32)
    min_p_B = np.full(len(samplings), min_p, np.float32)
    return np.asarray(restricted_by(logits_BV, top_k_B, top_p_B, min_p_B))


def kept(logits, sampling) -> set[int]:
    """The tokens that may be drawn; their logits must be as they were."""
    restricted = restricted_rows(logits[None], [sampling])[0]
    tokens = np.flatnonzero(restricted > -np.inf)
    np.testing.assert_array_equal(restricted[tokens], logits[tokens])
    return set(tokens.tolist())


def most_likely(logits, number) -> set[int]:
    return set(np.argsort(-logits)[:number].tolist())


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def sums_of_most_likely(logits):
    """Probability of the most likely token, of the two most likely, and so on."""
    return np.cumsum(np.sort(softmax(logits))[::-1])


def fewest_reaching(logits, share) -> set[int]:
    """The smallest set of most likely tokens whose probabilities reach `share`."""
    return most_likely(logits, 1 + int(np.argmax(sums_of_most_likely(logits) >= share)))


def assume_clear(logits, share):
    """Leaves out sums so near to `share` that float32 could fall on either side."""
    assume(np.min(np.abs(sums_of_most_likely(logits) - share)) > 1e-4)


@quickly
@given(distinct_logits)
def test_temperature_zero_takes_the_most_likely(logits):
    keys = jax.random.split(jax.random.key(0), 1)
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)):
        assert sample(jnp.asarray(logits[None]), sampling, keys) == np.argmax(logits)


@quickly
@given(distinct_logits, st.integers(1, V + 2))
def test_top_k_keeps_k(logits, k):
    assert kept(logits, Sampling(1.0, top_k=k)) == most_likely(logits, k)


@settings(max_examples=40, derandomize=True)
@given(distinct_logits, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    assume_clear(logits, p)
    assert kept(logits, Sampling(1.0, top_p=p)) == fewest_reaching(logits, p)


@quickly
@given(distinct_logits, st.integers(2, V - 1), st.floats(0.1, 0.99))
def test_top_p_is_of_what_top_k_left(logits, k, p):
    cut = np.where(np.isin(np.arange(V), list(most_likely(logits, k))), logits, -np.inf)
    assume_clear(cut, p)
    assert kept(logits, Sampling(1.0, top_k=k, top_p=p)) == fewest_reaching(cut, p)


@quickly
@given(distinct_logits)
def test_a_tiny_top_p_is_greedy(logits):
    assert kept(logits, Sampling(1.0, top_p=1e-6)) == {int(np.argmax(logits))}


def test_no_restriction_keeps_all():
    logits = np.linspace(-30, 0, V, dtype=np.float32)
    assert kept(logits, Sampling(1.0, top_k=0, top_p=1.0)) == set(range(V))


def test_rows_are_restricted_each_by_itself():
    logits = np.random.default_rng(0).normal(size=(5, V)).astype(np.float32)
    samplings = [Sampling(1.0, top_k=k, top_p=p) for k in (0, 2, 5) for p in (0.4, 0.7, 1.0)][:5]
    restricted = restricted_rows(logits, samplings)
    for row, right, sampling in zip(restricted, logits, samplings, strict=True):
        assert set(np.flatnonzero(row > -np.inf).tolist()) == kept(right, sampling)


@quickly
@given(distinct_logits, st.sampled_from([0.01, 0.2, 0.5, 1.0]))
def test_min_p_keeps_what_is_near_the_most_likely(logits, share):
    weights = softmax(logits) / softmax(logits).max()
    assume(np.min(np.abs(weights - share)) > 1e-4 or share == 1.0)
    (restricted,) = restricted_rows(logits[None], [Sampling(1.0)], min_p=share)
    np.testing.assert_array_equal(restricted > -np.inf, weights >= share)


def test_logits_that_are_not_numbers_stay():
    for broken in (np.nan, -np.nan):  # x86 makes negative ones
        logits = np.array([[0.0, 1.0, broken, 2.0]], np.float32)
        assert np.isnan(restricted_rows(logits, [Sampling(1.0, 2, 0.9)])[0, 2])
        assert np.isnan(restricted_rows(logits, [Sampling(1.0, 0, 0.1)])[0, 2])


ROWS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_k=3),
    Sampling(1.3, top_p=0.6),
    Sampling(0.9, top_k=4, top_p=0.8),
]


def row_sampling(samplings, **others):
    B = len(samplings)
    columns = {name: [getattr(s, name) for s in samplings] for name in Sampling._fields[:3]}
    columns |= dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty"), [0.0] * B)
    columns |= {"repetition_penalty": [1.0] * B} | others
    dtypes = {"top_k": jnp.int32}
    return RowSampling(
        **{f"{name}_B": jnp.array(x, dtypes.get(name, jnp.float32)) for name, x in columns.items()}
    )


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 0, 0], [1, 1, 0], [4, 2]], ids=str)
def test_each_row_draws_in_its_own_way(chosen):
    rows = [ROWS[index] for index in chosen]
    logits = jnp.array(np.random.default_rng(1).normal(size=(len(rows), 40)) * 2, jnp.float32)
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), len(rows))
        drawn = jax.jit(sample_rows)(logits, row_sampling(rows), keys)
        alone = [sample(logits[i : i + 1], s, keys[i : i + 1])[0] for i, s in enumerate(rows)]
        np.testing.assert_array_equal(drawn, np.array(alone))


def test_penalties_are_those_of_their_definitions():
    logits = np.array([[2.0, -2.0, 1.0, 0.5]] * 3, np.float32)
    seen = np.array([[True, True, False, False]] * 3)
    counts = np.array([[3, 0, 0, 1]] * 3, np.int32)
    rows = row_sampling(
        [Sampling()] * 3,
        repetition_penalty=[2.0, 1.0, 1.0],
        presence_penalty=[0.0, 0.5, 0.0],
        frequency_penalty=[0.0, 0.0, 0.25],
    )
    expected = [[1.0, -4.0, 1.0, 0.5], [1.5, -2.0, 1.0, 0.0], [1.25, -2.0, 1.0, 0.25]]
    np.testing.assert_allclose(penalize(logits, rows, seen, counts), expected)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(0.8, top_p=0.6)],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should_be(sampling):
    draws = 20_000
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5], np.float32)
    scaled = logits / sampling.temperature
    if sampling.top_k:
        scaled[~np.isin(np.arange(5), list(most_likely(scaled, sampling.top_k)))] = -np.inf
    if sampling.top_p < 1:
        scaled[~np.isin(np.arange(5), list(fewest_reaching(scaled, sampling.top_p)))] = -np.inf
    keys = jax.random.split(jax.random.key(7), draws)
    drawn = jax.jit(functools.partial(sample, sampling=sampling))(
        jnp.broadcast_to(logits, (draws, 5)), keys_B=keys
    )
    assert drawn.dtype == jnp.int32
    shares = np.bincount(drawn, minlength=5) / draws
    expected = softmax(scaled)
    assert np.all(shares[expected == 0] == 0)
    # Four standard deviations of a share.
    assert np.all(np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.1), "temperature is -0.1"),
        (Sampling(top_k=-1), "top_k is -1"),
        (Sampling(top_p=0.0), "top_p is 0.0"),
        (Sampling(top_p=1.1), "top_p is 1.1"),
        (Sampling(top_p=float("nan")), "top_p is nan"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
    ],
)
def test_values_out_of_range_are_refused(sampling, message):
    with pytest.raises(InputError, match=message):
        sampling.check()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(2.0, 5, 1.0), Sampling(0.0, 0, 1e-9)])
def test_values_in_range_pass(sampling):
    sampling.check()
