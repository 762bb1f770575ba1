"""Whole samples into packs of at most `capacity` tokens: full, and each with long and short samples in it.

Longest first. Most of the tokens are dealt in rounds: every pack takes one sample, the emptiest pack the longest one, so packs are
alike in length, in number of samples and in cost. The short samples that remain fill the gaps by best fit. How much can be dealt
before gaps stay open depends on the lengths, so less and less is tried until the packs are as few as best fit decreasing makes;
that itself is the last resort. Samples are shuffled into windows, so packs differ from epoch to epoch.

With `costs`, samples of about the same length are dealt by cost, and dealt packs exchange samples (`balance.exchange`) before gaps are
filled.
"""

from typing import NamedTuple

import numpy as np

from eagle_train.executors import in_threads

from .balance import exchange

WINDOW = 1 << 16
DEALT = (0.95, 0.9, 0.5)
"""Shares of the tokens that are dealt in rounds, tried in order."""
TOLERANCE = 2000
"""A better balanced packing may have one pack in this many more than best fit decreasing has (0.05 % of fill)."""
BLOCK = 32
"""Samples of a round, and packs, that are neighbours in length and may be matched by cost instead."""
QUADRATIC_AT = 65536
"""Tokens at which attention costs as much as everything else in a layer: 13 GFLOP against 0.2 MFLOP times n a token at 8B's sizes."""


class Packs(NamedTuple):
    """Pack p holds items[offsets[p]:offsets[p + 1]] (indices into the lengths that were packed)."""

    offsets: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def sample_costs(lengths: np.ndarray, quadratic_at: float = QUADRATIC_AT) -> np.ndarray:
    """What samples cost a rank, in tokens' worth of linear work: n * (1 + n / quadratic_at)."""
    lengths = np.asarray(lengths, np.float64)
    return lengths * (1 + lengths / quadratic_at)


def pack(lengths: np.ndarray, capacity: int, *, costs: np.ndarray | None = None, seed: int = 0, window: int = WINDOW) -> Packs:
    """Pack samples of `lengths` (int [S], each 1 ... capacity) into packs of at most `capacity` tokens.

    costs: float [S], of each sample: packs are made alike in cost, too. Default: a sample costs as much as it has tokens, and costs in
    proportion to lengths give the same packs.
    Every sample is in exactly one pack. A pure function of its arguments. Raises ValueError for a length outside 1 ... capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) == 0:
        return Packs(np.zeros(1, np.int64), np.zeros(0, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must lie in 1 ... {capacity}, got {lengths.min()} ... {lengths.max()}; drop longer samples first")

    def pack_part(part: np.ndarray) -> Packs:
        bins, used = _pack_window(lengths[part], capacity, costs[part] if costs is not None else None)
        return Packs(np.bincount(bins, minlength=used), part[np.lexsort((part, bins))])  # sizes and items, which rise within a pack

    parts = in_threads(pack_part, np.array_split(shuffled(len(lengths), seed), -(-len(lengths) // window)))
    sizes = np.concatenate([part.offsets for part in parts])
    return Packs(np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([part.items for part in parts]))


def narrowed(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 on in rising order as int32 where that holds them."""
    return values.astype(np.int32) if not len(values) or values[-1] < 1 << 31 else values


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of `count` indices by sorted hashes: the same on every machine and with every numpy."""
    # No two hashes are equal (splitmix64 is a bijection), so that every way of sorting gives this order.
    return np.argsort(hashes(np.arange(count, dtype=np.uint64), seed))


def hashes(values: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of `values` (uint64 [N]) under a seed, uint64 [N]."""
    with np.errstate(over="ignore"):
        x = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        for _ in range(2):  # twice: neighbouring seeds must not give shifted copies of each other
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = (x ^ (x >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
    return x


def _pack_window(lengths: np.ndarray, capacity: int, costs: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Pack index of each sample, and the number of packs."""
    order = np.argsort(-lengths, kind="stable")
    descending, costs = lengths[order], costs[order] if costs is not None else None
    least = _least_packs(descending, capacity)
    bins, used = _deal(descending, capacity, least, DEALT[0], costs)
    if used > least + least // TOLERANCE:
        # Within what is allowed the most even one wins, but one with clearly fewer packs beats them all.
        fitted, fewest = _best_fit(descending, capacity)
        allowed = fewest + fewest // TOLERANCE
        dealt = [(bins, used), *(_deal(descending, capacity, least, share, costs, most=allowed) for share in DEALT[1:])]
        fewest = min(count for _, count in dealt)
        if fewest <= allowed:
            bins, used = next(candidate for candidate in dealt if candidate[1] <= min(allowed, fewest + fewest // TOLERANCE))
        else:
            bins, used = fitted, int(fitted.max()) + 1
    result = np.empty(len(lengths), np.int64)
    result[order] = bins
    return result, used


def _least_packs(descending: np.ndarray, capacity: int) -> int:
    """A lower bound of the packs needed: tokens over capacity, or, when many are longer than half a pack, those and what fits into
    none of them (the bound L2 of Martello and Toth, 1990: the best over all lengths that count as negligible)."""
    total = np.concatenate([[0], np.cumsum(descending)])
    lengths = -descending  # rising, for searchsorted
    halves = int(np.searchsorted(lengths, -(capacity // 2)))  # samples longer than half a pack
    shortest = np.unique(descending[halves:])
    if not len(shortest):
        return len(descending)
    stop = np.searchsorted(lengths, -shortest, side="right")  # samples at least as long as each of `shortest`
    alone = np.searchsorted(lengths, shortest - capacity)  # samples that leave no room for one of them
    fits = (halves - alone) * capacity - (total[halves] - total[alone])
    return halves + max(0, int(np.max(-(-(total[stop] - total[halves] - fits) // capacity))))


def _deal(
    descending: np.ndarray, capacity: int, count: int, share: float, costs: np.ndarray | None = None, most: int | None = None
) -> tuple[np.ndarray, int]:
    """`share` of the tokens, longest samples first, in rounds over `count` packs; the rest, and what did not fit, by best fit.

    Stops, and returns a number above `most`, when it needs more packs than that.
    """
    stop = int(np.searchsorted(np.cumsum(descending), share * descending.sum()))
    bins = np.full(len(descending), -1, np.int64)
    room = np.full(count, capacity, np.int64)
    spent = np.zeros(count)
    for start in range(0, stop, count):
        chunk = descending[start : min(start + count, stop)]
        target = np.argsort(-room, kind="stable")[: len(chunk)]
        if costs is not None:
            target = _matched(costs[start : start + len(chunk)], spent, target)
        fits = np.flatnonzero(chunk <= room[target])
        bins[start + fits] = target[fits]
        room[target[fits]] -= chunk[fits]
        if costs is not None:
            spent[target[fits]] += costs[start + fits]
    if costs is not None and len(rest := np.flatnonzero(bins < 0)) < len(bins):
        dealt = np.flatnonzero(bins >= 0)
        # What a pack has room for will cost as much as the rest does on average.
        price = costs[rest].sum() / descending[rest].sum() if len(rest) else costs.sum() / descending.sum()
        dearer = costs[dealt] - price * descending[dealt]
        bins[dealt] = exchange(bins[dealt], descending[dealt], dearer, count, capacity, costs.sum() / count)
        room = capacity - np.bincount(bins[dealt], weights=descending[dealt], minlength=count).astype(np.int64)
    rest = np.flatnonzero(bins < 0)
    chosen, opened = _best_fit(descending[rest], capacity, room, most)
    if len(chosen) < len(rest):
        return bins, opened
    bins[rest] = chosen
    used, bins = np.unique(bins, return_inverse=True)
    return bins, len(used)


def _matched(costs: np.ndarray, spent: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`target`, the pack of each sample of a round, with the costliest of every `BLOCK` neighbours in the pack that costs least so far."""
    block = np.arange(len(target)) // BLOCK
    result = np.empty_like(target)
    result[np.lexsort((-costs, block))] = target[np.lexsort((spent[target], block))]
    return result


def _best_fit(lengths: np.ndarray, capacity: int, room: np.ndarray | None = None, most: int | None = None) -> tuple[np.ndarray, int]:
    """Each sample in turn into the fullest pack that can take it, else a new one; `room` is what given packs have left.

    Returns the pack of each sample and the number of packs; stops short at more than `most` packs.

    Packs are kept by the room in them, with two levels of bit sets over rooms: the tightest one is found in a few operations. A pack
    that took a sample is the tightest one for the next of the same length, so it takes as many as it can at once: with falling
    lengths that is 2.6 to 4 times as fast as one by one. One long loop, because a call per sample would double its time.
    """
    packs: list[list[int] | None] = [None] * (capacity + 1)
    words = [0] * ((capacity >> 9) + 1)
    top = 0
    count = 0
    if room is not None:
        count = len(room)
        for index, free in enumerate(room.tolist()):
            if held := packs[free]:
                held.append(index)
            else:
                packs[free] = [index]
        for free in np.unique(room[room > 0]).tolist():
            words[free >> 9] |= 1 << (free & 511)
            top |= 1 << (free >> 9)
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    chosen: list[int] = []
    for length, left in zip(lengths[starts].tolist(), np.diff(starts, append=len(lengths)).tolist()):
        while left:
            word = length >> 9
            bits = words[word] >> (length & 511)
            if bits:
                free = length + (bits & -bits).bit_length() - 1
            elif above := top >> (word + 1):
                word += (above & -above).bit_length()
                bits = words[word]
                free = (word << 9) + (bits & -bits).bit_length() - 1
            else:
                free = 0
            if free:
                held = packs[free]
                assert held
                target = held.pop()
                if not held:
                    words[word] ^= 1 << (free & 511)
                    if not words[word]:
                        top ^= 1 << word
            else:
                free, target = capacity, count
                count += 1
                if most is not None and count > most:
                    return np.asarray(chosen, np.int64), count
            if free < 2 * length:
                chosen.append(target)
                free -= length
                left -= 1
            else:
                taken = min(left, free // length)
                chosen += [target] * taken
                free -= taken * length
                left -= taken
            if free:
                held = packs[free]
                if held:
                    held.append(target)
                else:
                    packs[free] = [target]
                    words[free >> 9] |= 1 << (free & 511)
                    top |= 1 << (free >> 9)
    return np.asarray(chosen, np.int64), count
