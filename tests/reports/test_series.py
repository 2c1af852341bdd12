"""Series of metrics, and the shorter series that are drawn."""

import numpy as np
import pytest

from plt_jax.reports.series import Series, means, series, smooth, thin

NAN = float("nan")


def test_a_series_is_of_the_rows_that_have_it():
    rows = [
        {"step": 1, "a": 2.0, "b": [[1.0, None]]},
        {"step": 2},
        {"step": 3, "a": None, "b": [[3.0, 4.0]], "none": None},
    ]
    steps_R, values_R = series(rows, "a")
    assert steps_R.tolist() == [1, 3]
    assert values_R[0] == 2.0 and np.isnan(values_R[1])
    assert series(rows, "b").values_R.shape == (2, 1, 2)
    assert series(rows, "none") is series(rows, "missing") is None


def test_thinning_keeps_every_spike():
    values_R = np.sin(np.arange(100_000) / 1e4)
    values_R[[0, 777, 50_000, 99_999]] = [9.0, -8.0, 7.0, -6.0]
    values_R[20_000:30_000] = NAN
    thinned = thin(Series(np.arange(100_000), values_R), 1000)
    assert 900 < len(thinned.steps_R) <= 1002
    assert np.isnan(thinned.values_R).any()
    assert (np.diff(thinned.steps_R) > 0).all()
    assert {0, 777, 50_000, 99_999} <= set(thinned.steps_R.tolist())
    assert np.array_equal(thinned.values_R, values_R[thinned.steps_R], equal_nan=True)
    short = Series(np.arange(3), np.array([1.0, NAN, 2.0]))
    assert thin(short) is short


def test_smoothing_is_a_median_of_what_is_finite():
    full = Series(np.arange(6), np.array([1.0, 2.0, NAN, NAN, NAN, 8.0]))
    assert smooth(full).values_R.tolist() == pytest.approx([1.5, 1.5, 2, NAN, 8, 8], nan_ok=True)
    values_R = np.ones(10_000)
    values_R[5_000:5_005] = 100.0
    smoothed = smooth(Series(np.arange(10_000), values_R), 100)
    assert len(smoothed.steps_R) == 100 and (smoothed.values_R == 1).all()


def test_means_are_over_stretches_of_rows():
    values_RJ = np.array([[1.0, 2.0], [3.0, NAN], [5.0, NAN], [7.0, NAN]])
    found = means(Series(np.array([10, 20, 30, 40]), values_RJ), 2)
    assert found.edges.tolist() == [0, 20, 40]
    assert found.values_C[:, 0].tolist() == [2, 6]
    assert found.values_C[0, 1] == 2 and np.isnan(found.values_C[1, 1])
    assert means(Series(np.array([7]), np.array([1.0]))).edges.tolist() == [6, 7]
