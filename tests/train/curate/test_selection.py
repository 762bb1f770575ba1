"""Blocked, lazy selection equals brute force."""

import numpy as np
import pytest

from eagle_train.curate.selection import farthest_first, near_duplicates, nearest, share_hours


def unit(count, width=16, seed=0):
    values = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("block_bytes", [4, 300, 5000, 1 << 28])
def test_nearest_equals_the_whole_product(block_bytes):
    a, b = unit(83), unit(57, seed=1)
    product = a @ b.T
    found = nearest(a, b, block_bytes=block_bytes)
    np.testing.assert_allclose(found.similarity, product.max(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(found.which, product.argmax(axis=1))


def test_nearest_without_others_and_with_other_widths():
    found = nearest(unit(3), np.empty((0, 0), np.float32))
    assert found.similarity.tolist() == [-np.inf] * 3
    assert found.which.tolist() == [-1] * 3
    with pytest.raises(ValueError, match="same encoder"):
        nearest(unit(3), unit(3, 8))


@pytest.mark.parametrize("block_bytes", [4, 400, 1 << 28])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_near_duplicates_equal_a_loop(block_bytes, threshold):
    vectors = unit(150, 4)
    kept, expected = [], []
    for row in range(len(vectors)):
        hits = [other for other in kept if vectors[row] @ vectors[other] >= threshold]
        expected.append(hits[0] if hits else -1)
        if not hits:
            kept.append(row)
    assert near_duplicates(vectors, threshold, block_bytes=block_bytes).tolist() == expected


@pytest.mark.parametrize("active", [1, 5, 64, 4096])
@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("budget", [0.0, 3.0, 200.0, 1e9])
def test_farthest_first_equals_a_loop(active, seeded, budget):
    vectors, weights = unit(300, 8, 2), np.random.default_rng(3).uniform(1, 9, 300)
    start = nearest(vectors, unit(40, 8, 4)).similarity if seeded else np.full(300, -np.inf, np.float32)
    closest, left, open_, expected = start.copy(), budget, np.ones(300, bool), []
    while (fits := open_ & (weights <= left)).any():
        best = int(np.flatnonzero(fits)[closest[fits].argmin()])
        expected.append(best)
        open_[best] = False
        left -= weights[best]
        closest = np.maximum(closest, vectors @ vectors[best])
    assert farthest_first(vectors, start, weights, budget, active=active).tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_shared_hours_raise_the_lowest_buckets(seed):
    rng = np.random.default_rng(seed)
    available, old = rng.uniform(0, 10, 5).round(1), rng.uniform(0, 10, 5).round(1)
    hours = float(rng.uniform(0, 40))
    given = share_hours(available, old, hours)
    assert given.sum() == pytest.approx(min(hours, available.sum()))
    assert (given >= -1e-9).all()
    assert (given <= available + 1e-9).all()
    # A bucket that could take more is nowhere lower than one that got some.
    for low in np.flatnonzero(given < available - 1e-9):
        for high in np.flatnonzero(given > 1e-9):
            assert old[low] + given[low] >= old[high] + given[high] - 1e-6
