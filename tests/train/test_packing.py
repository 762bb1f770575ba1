"""Packing: nothing is lost, nothing is too long, packs are full and alike."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_train.planning.packing import _best_fit, _least_packs, hashes, pack, sample_costs, shuffled

CAPACITY = 16384


def short_images(rng, count):
    """1 to 13 tiles of 256 tokens and a question."""
    return 256 * rng.integers(1, 14, count) + rng.integers(30, 400, count)


def mixed(rng, count):
    """Short images, a tenth documents, a tenth anything up to the context."""
    lengths, kind = short_images(rng, count), rng.random(count)
    return np.where(kind < 0.1, rng.integers(4000, CAPACITY, count), np.where(kind < 0.2, rng.integers(2000, 8000, count), lengths))


def video_heavy(rng, count):
    """Two fifths short images, the others videos of 30 to 61 frames: most are longer than half a pack."""
    videos = 266 * rng.integers(30, 61, count) + rng.integers(50, 150, count)
    return np.where(rng.random(count) < 0.15, short_images(rng, count), videos)


def best_fit(lengths, capacity=CAPACITY, rooms=()):
    """Best fit in the given order, the plain way: the number of packs."""
    rooms = list(rooms)
    for length in lengths:
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


def worst_fit(lengths):
    """The original's: into the emptiest open pack, if it fits there."""
    rooms: list[int] = []
    for length in lengths:
        emptiest = max(range(len(rooms)), key=rooms.__getitem__, default=None)
        if emptiest is not None and rooms[emptiest] >= length:
            rooms[emptiest] -= length
        else:
            rooms.append(CAPACITY - length)
    return len(rooms)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 300), max_size=200), st.integers(300, 1000), st.integers(0, 2**40), st.integers(1, 70))
def test_every_sample_is_in_exactly_one_pack(lengths, capacity, seed, window):
    packs = pack(np.array(lengths, np.int64), capacity, seed=seed, window=window)
    assert sorted(packs.items.tolist()) == list(range(len(lengths)))
    for first, last in zip(packs.offsets[:-1], packs.offsets[1:]):
        assert first < last
        assert sum(lengths[item] for item in packs.items[first:last]) <= capacity


@pytest.mark.parametrize("distribution", [short_images, mixed, video_heavy])
def test_fill_is_that_of_best_fit_decreasing(distribution):
    lengths = distribution(np.random.default_rng(0), 4000).astype(np.int64)
    packs = len(pack(lengths, CAPACITY, seed=1))
    decreasing = best_fit(np.sort(lengths)[::-1].tolist())
    assert packs <= decreasing * 1.0005 + 0.999
    assert packs <= best_fit(lengths.tolist())
    assert packs < worst_fit(lengths.tolist())


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 1200), st.lists(st.integers(0, 40), max_size=10))
def test_best_fit_with_equal_lengths_at_once_is_best_fit_one_by_one(lengths, capacity, rooms):
    for order in (lengths, sorted(lengths, reverse=True)):
        chosen, count = _best_fit(np.array(order), capacity, np.array(rooms, np.int64))
        assert count == best_fit(order, capacity, rooms)
        used = np.bincount(chosen, weights=order, minlength=count)
        assert (used <= [*rooms, *[capacity] * (count - len(rooms))]).all()
        assert len(_best_fit(np.array(order), capacity, np.array(rooms, np.int64), count)[0]) == len(order)
        if count > len(rooms):
            assert _best_fit(np.array(order), capacity, np.array(rooms, np.int64), count - 1)[1] == count


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(30, 60))
def test_the_lower_bound_is_one(lengths, capacity):
    def optimum(rest, rooms):
        if not rest:
            return len(rooms)
        tried = {room for room in rooms if room >= rest[0]}
        fitting = [optimum(rest[1:], [*rooms[: (at := rooms.index(room))], room - rest[0], *rooms[at + 1 :]]) for room in tried]
        return min([*fitting, optimum(rest[1:], [*rooms, capacity - rest[0]])])

    falling = sorted(lengths, reverse=True)
    least = _least_packs(np.array(falling), capacity)
    assert -(-sum(lengths) // capacity) <= least <= optimum(falling, [])


def test_the_lower_bound_sees_what_fits_nowhere():
    assert _least_packs(np.array([9, 9, 9, 2, 2]), 10) == 4
    assert _least_packs(np.array([6, 6, 6, 6]), 10) == 4


def test_packs_cost_about_the_same():
    lengths = mixed(np.random.default_rng(1), 20000).astype(np.int64)
    packs = pack(lengths, CAPACITY, seed=1)
    costs = np.add.reduceat(sample_costs(lengths)[packs.items], packs.offsets[:-1])
    assert costs.std() / costs.mean() < 0.06
    assert costs.max() / costs.mean() < 1.2


def test_every_pack_mixes_short_and_long():
    rng = np.random.default_rng(2)
    lengths = np.concatenate([rng.integers(3000, 7000, 500), rng.integers(200, 900, 5000)])
    packs = pack(lengths, CAPACITY, seed=3)
    long = np.add.reduceat((lengths >= 3000)[packs.items].astype(int), packs.offsets[:-1])
    short = np.diff(packs.offsets) - long
    assert (long > 0).mean() > 0.98
    assert (short > 0).mean() > 0.98


def test_same_arguments_same_packs_other_seed_other_packs():
    lengths = mixed(np.random.default_rng(3), 3000).astype(np.int64)
    first, again, other = (pack(lengths, CAPACITY, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, other.items)


def test_lengths_that_no_pack_holds_are_refused():
    with pytest.raises(ValueError, match="drop longer samples first"):
        pack(np.array([5, 11]), 10)
    with pytest.raises(ValueError, match=r"got 0 \.\.\. 3"):
        pack(np.array([0, 3]), 10)


def test_order_is_the_same_on_every_machine():
    assert shuffled(8, 0).tolist() == GOLDEN
    assert sorted(shuffled(1000, 7).tolist()) == list(range(1000))
    assert len(set(hashes(np.arange(1000, dtype=np.uint64), 3).tolist())) == 1000
    # Neighbouring seeds don't give shifted copies of one order.
    a, b = shuffled(1000, 1), shuffled(1000, 2)
    assert max(np.mean(np.roll(a, shift) == b) for shift in range(-3, 4)) < 0.02


GOLDEN = [2, 4, 0, 6, 7, 3, 5, 1]


def test_speed():
    lengths = mixed(np.random.default_rng(4), 100_000).astype(np.int64)
    best = 0.0
    for seed in range(3):
        start = time.process_time()
        pack(lengths, CAPACITY, seed=seed)
        best = max(best, len(lengths) / (time.process_time() - start))
    assert best > 100_000  # 310 000 to 330 000 a second next to other work; far below means another algorithm
