"""Selection of clips by vectors: novelty, near-duplicates, and farthest-first. Exact, in blocked matrix products of bounded memory.

All vectors are float32 [n, d] of length 1, so that a product is a cosine similarity.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
BLOCK_BYTES = 1 << 28
"""Memory of one block of similarities."""
ACTIVE = 4096
"""Vectors of a greedy selection that are kept up to date: 8 MB at 512 values, which stay in the cache."""


class Nearest(NamedTuple):
    """similarity: float32 [n], highest cosine similarity; which: int64 [n], the vector that has it (the first of equals), or -1."""

    similarity: NDArray[np.float32]
    which: NDArray[np.int64]


def nearest(queries: Vectors, others: Vectors, *, device: str = "cpu", block_bytes: int = BLOCK_BYTES) -> Nearest:
    """The most similar of `others` [m, d] for each of `queries` [n, d]; without others the similarity is -inf and the index -1.

    Time is one product of n x m x d; memory `block_bytes` next to the vectors. Raises ValueError when the widths differ.
    """
    best = np.full(len(queries), -np.inf, np.float32)
    index = np.full(len(queries), -1, np.int64)
    if not len(queries) or not len(others):
        return Nearest(best, index)
    if queries.shape[1] != others.shape[1]:
        raise ValueError(f"vectors of {queries.shape[1]} and {others.shape[1]} values can't be compared; embed both with the same encoder")
    if device != "cpu":
        return _nearest_on(queries, others, device, block_bytes)
    rows, columns = _block(len(queries), len(others), block_bytes)
    for first in range(0, len(others), columns):
        part = others[first : first + columns].T
        for start in range(0, len(queries), rows):
            block = queries[start : start + rows] @ part
            here = block.argmax(axis=1)
            value = block[np.arange(len(block)), here]
            better = value > best[start : start + rows]
            best[start : start + rows][better] = value[better]
            index[start : start + rows][better] = here[better] + first
    return Nearest(best, index)


def _nearest_on(queries: Vectors, others: Vectors, device: str, block_bytes: int) -> Nearest:
    """The same on a GPU, in float32 without TF32."""
    import torch

    rows, columns = _block(len(queries), len(others), block_bytes)
    best = torch.full((len(queries),), -torch.inf, device=device)
    index = torch.full((len(queries),), -1, dtype=torch.int64, device=device)
    asked = torch.from_numpy(queries).to(device)
    for first in range(0, len(others), columns):
        part = torch.from_numpy(others[first : first + columns]).to(device).T
        for start in range(0, len(queries), rows):
            value, here = (asked[start : start + rows] @ part).max(dim=1)
            better = value > best[start : start + rows]
            best[start : start + rows] = torch.where(better, value, best[start : start + rows])
            index[start : start + rows] = torch.where(better, here + first, index[start : start + rows])
    return Nearest(best.cpu().numpy(), index.cpu().numpy())


def near_duplicates(vectors: Vectors, threshold: float, *, block_bytes: int = BLOCK_BYTES) -> NDArray[np.int64]:
    """For each vector the first kept vector before it whose similarity reaches `threshold`, or -1: then it is kept. int64 [n].

    In order: a vector is compared only with those that are kept, so that a chain of small steps does not remove everything.
    """
    of = np.full(len(vectors), -1, np.int64)
    kept = np.empty(0, np.int64)
    rows = max(1, min(4096, int((block_bytes // 4) ** 0.5)))
    for first in range(0, len(vectors), rows):
        block = vectors[first : first + rows]
        for start in range(0, len(kept), max(1, block_bytes // (4 * len(block)))):
            some = kept[start : start + max(1, block_bytes // (4 * len(block)))]
            similar = block @ vectors[some].T >= threshold
            hit = similar.any(axis=1) & (of[first : first + len(block)] < 0)
            of[first : first + len(block)][hit] = some[similar[hit].argmax(axis=1)]
        within = block @ block.T >= threshold
        new = np.zeros(len(block), bool)
        for row in range(len(block)):
            if of[first + row] < 0:
                before = np.flatnonzero(within[row, :row] & new[:row])
                if len(before):
                    of[first + row] = first + before[0]
                else:
                    new[row] = True
        kept = np.concatenate([kept, np.flatnonzero(new) + first])
    return of


def farthest_first(
    vectors: Vectors,
    similarity: NDArray[np.float32],
    weights: NDArray[np.float64],
    budget: float,
    order: Callable[[int], None] | None = None,
    *,
    active: int = ACTIVE,
) -> NDArray[np.int64]:
    """Greedy selection: the vector that is least similar to the seed and to all that are selected, until the weights fill the budget.

    vectors: [n, d]. similarity: float32 [n], highest similarity to the seed (-inf: no seed; the first vector is then taken first).
    weights: float64 [n], positive. budget: of the sum of the weights; a vector that does not fit is passed over. order: called with the
    number of selections. Returns indices in the order of selection; of equals, the first.

    Similarities only grow, so that an old one is a lower bound. The `active` vectors with the lowest ones are kept up to date; the others
    are brought up to date, in one matrix product, when the lowest active one reaches their bound. The result does not depend on `active`.
    """
    closest = similarity.astype(np.float32).copy()
    left = float(budget)
    open_ = np.ones(len(vectors), bool)
    chosen: list[int] = []
    behind = 0  # selections that `closest` knows of
    while True:
        open_ &= weights <= left + 1e-9
        candidates = np.flatnonzero(open_)
        if not len(candidates):
            return np.array(chosen, np.int64)
        if behind < len(chosen):
            recent = vectors[chosen[behind:]]
            rows = max(1, BLOCK_BYTES // (4 * len(recent)))
            for start in range(0, len(candidates), rows):
                some = candidates[start : start + rows]
                closest[some] = np.maximum(closest[some], (vectors[some] @ recent.T).max(axis=1))
            behind = len(chosen)
        by_value = candidates[np.argsort(closest[candidates], kind="stable")]
        bound = closest[by_value[active]] if len(by_value) > active else np.inf
        here = np.sort(by_value[:active])
        mine, near, heavy = vectors[here], closest[here], weights[here]
        free = np.ones(len(here), bool)
        moved = False
        while (fits := free & (heavy <= left + 1e-9)).any():
            best = int(np.flatnonzero(fits)[near[fits].argmin()])
            if moved and near[best] >= bound:
                break
            moved = True
            chosen.append(int(here[best]))
            free[best] = open_[here[best]] = False
            left -= float(heavy[best])
            np.maximum(near, mine @ mine[best], out=near)
            if order is not None:
                order(len(chosen))


def share_hours(available: NDArray[np.float64], seed: NDArray[np.float64], hours: float) -> NDArray[np.float64]:
    """Hours to select per bucket, so that seed + selected is as even as possible: the lowest buckets are filled first. float64 [buckets].

    available, seed: hours per bucket. Water is poured into the buckets up to one level, where no bucket takes more than it has; the sum is
    min(hours, sum of available).
    """
    total = min(hours, float(available.sum()))
    edges = np.unique(np.concatenate([seed, seed + available]))
    filled = [float(np.clip(level - seed, 0, available).sum()) for level in edges]
    at = int(np.searchsorted(filled, total))
    if at == 0:
        return np.zeros_like(available)
    if at == len(edges):
        return available.copy()
    part = (total - filled[at - 1]) / (filled[at] - filled[at - 1])
    level = edges[at - 1] + part * (edges[at] - edges[at - 1])
    return np.clip(level - seed, 0, available)


def _block(rows: int, columns: int, block_bytes: int) -> tuple[int, int]:
    """Rows and columns of a block of float32 within `block_bytes`, near a square so that both sides are read as seldom as possible."""
    side = max(1, int((block_bytes // 4) ** 0.5))
    rows = min(rows, side)
    return rows, max(1, min(columns, block_bytes // (4 * rows)))
