"""Clustered confidence intervals: they cover the truth, are Wilson's for independent values, and widen with the dependence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_train.evaluation.intervals import clustered_interval


def test_independent_values_give_wilsons_interval():
    # Wilson's own form: the values p for which |mean - p| = z sqrt(p (1 - p) / n).
    values = [1.0] * 7 + [0.0] * 3
    low, high = clustered_interval(values, range(10))
    # 10 clusters of one: the unbiased variance is 10/9 of the plain one, so 9 effective values.
    for bound in (low, high):
        assert abs(0.7 - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / 9), rel=1e-6)


def test_repeated_questions_about_a_medium_bring_nothing():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 30).astype(float)
    once = clustered_interval(values.tolist(), range(30))
    repeated = clustered_interval(np.repeat(values, 5).tolist(), np.repeat(np.arange(30), 5).tolist())
    assert repeated == pytest.approx(once)
    naive = clustered_interval(np.repeat(values, 5).tolist(), range(150))
    assert naive[1] - naive[0] < 0.6 * (once[1] - once[0])


def test_bounds_of_extreme_results():
    assert clustered_interval([], []) == (0.0, 1.0)
    low, high = clustered_interval([1.0] * 20, [0] * 20)
    assert low < 0.3, "20 questions about one video say little about other videos"
    assert high == 1.0
    assert clustered_interval([1.0] * 20, range(20))[0] > 0.8
    assert clustered_interval([0.0, 0.0], [0, 1])[0] == 0.0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mean", [0.5, 0.9])
def test_intervals_cover_the_truth(share, mean):
    """Of 400 draws of 40 media with 5 questions each, in which a share of the media have all answers alike, at least 92 % cover it."""
    rng = np.random.default_rng(int(share * 10 + mean * 100))
    clusters = np.repeat(np.arange(40), 5)
    covered = 0
    for _ in range(400):
        alike = rng.random(40) < share
        values = np.where(np.repeat(alike, 5), np.repeat(rng.random(40) < mean, 5), rng.random(200) < mean).astype(float)
        low, high = clustered_interval(values.tolist(), clusters.tolist())
        covered += low <= mean <= high
    assert covered >= 0.92 * 400


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.0, 1.0]))
def test_the_interval_contains_a_mean_at_the_end_of_the_scale(values, groups, value):
    """Exactly: a bound a rounding error beyond it was drawn as an error bar of negative length."""
    low, high = clustered_interval([value] * values, [number % groups for number in range(values)])
    assert low <= value <= high
