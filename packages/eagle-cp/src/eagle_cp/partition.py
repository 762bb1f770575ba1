"""Which rank holds which tokens: long documents are cut in a zigzag over all ranks, short ones stay whole on one rank. Every rank gets the
same number of tokens and nearly the same work.

A document cut over `r` ranks is nested: rank 0 gets the first and the last piece, rank `r - 1` the two in the middle. The tokens of each
rank then attend to half of the document on average, and its work is proportional to its tokens. Whole documents are assigned longest
first. As few documents are cut as bring the work of the ranks within `tolerance`. The pieces of a cut document need not be equal: they
compensate what whole documents leave uneven, in tokens and in work. So no document is padded, whatever its length.

With `whole` nothing is cut: ranks get different numbers of tokens, and attention needs no communication.

A tree (`trees.py`) is placed as one document: it is whole on a rank, or its tokens are cut, from the first of the prefix to the last of the
last branch. Its tokens in a branch attend to the whole prefix, so the front and the back piece of a rank are balanced by their work.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from eagle_cp.segments import cumulative
from eagle_cp.trees import Pairs, tree_pairs, trees


class Piece(NamedTuple):
    """Tokens `[start, stop)` of document `document`, counted from the document's first token."""

    document: int
    start: int
    stop: int


class RankDocuments(NamedTuple):
    """What one rank holds, in local order: pieces of cut documents first (document by document, front before back), then whole
    documents."""

    pieces: tuple[Piece, ...]
    whole: tuple[int, ...]

    @property
    def piece_tokens(self) -> int:
        return sum(p.stop - p.start for p in self.pieces)


class Partition(NamedTuple):
    """`ranks`: what each rank holds; `cut`: documents that are cut over ranks, ascending; `work`: attended (query, key) pairs of each rank,
    causal, one query head."""

    ranks: tuple[RankDocuments, ...]
    cut: tuple[int, ...]
    work: tuple[int, ...]

    def rank_tokens(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of each rank; lengths: of the documents."""
        return [rank.piece_tokens + sum(lengths[d] for d in rank.whole) for rank in self.ranks]

    @property
    def imbalance(self) -> float:
        """Largest work of a rank over the mean, minus 1."""
        total = sum(self.work)
        return max(self.work) * len(self.work) / total - 1 if total else 0.0


def partition(
    lengths: Sequence[int], ranks: int, *, tolerance: float = 0.02, prefixes: Sequence[int] = (), whole: bool = False
) -> Partition:
    """Assigns documents of `lengths` tokens to `ranks` ranks, each with `total // ranks` tokens, the first `total % ranks` with one more.

    whole: no document (or tree) is cut, and ranks get about as many tokens and as much work as that allows; a rank may get none.
    prefixes: the document that each one continues, or -1 (`trees.py`); default: no document has a prefix. Pieces then are of the prefix
        and of branches, and a tree is either whole on one rank or all its documents are `cut`.

    Deterministic. The `imbalance` of the result is at most `tolerance` whenever cutting some number of the longest documents achieves it,
    otherwise the smallest one found."""
    if not prefixes:
        return _uncut(lengths, ranks, None) if whole else _partition(lengths, ranks, tolerance, None)
    groups = trees(prefixes)
    totals, pairs = [sum(lengths[i] for i in group) for group in groups], tree_pairs(lengths, groups)
    placed = _uncut(totals, ranks, pairs) if whole else _partition(totals, ranks, tolerance, pairs)
    starts = [cumulative([lengths[i] for i in group]) for group in groups]

    def pieces_of(piece: Piece) -> list[Piece]:
        group, at = groups[piece.document], starts[piece.document]
        spans = [(i, max(piece.start, a) - a, min(piece.stop, b) - a) for i, a, b in zip(group, at, at[1:])]
        return [Piece(i, start, stop) for i, start, stop in spans if start < stop]

    documents = [
        RankDocuments(tuple(p for piece in rank.pieces for p in pieces_of(piece)), tuple(i for t in rank.whole for i in groups[t]))
        for rank in placed.ranks
    ]
    return Partition(tuple(documents), tuple(i for t in placed.cut for i in groups[t]), placed.work)


def _partition(lengths: Sequence[int], ranks: int, tolerance: float, pairs: Pairs | None) -> Partition:
    """`pairs`: the work of parts of a document; None: that of documents without branches."""
    total = sum(lengths)
    targets = [total // ranks + (i < total % ranks) for i in range(ranks)]
    by_length = sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))
    work_of = [_pairs(0, n) for n in lengths] if pairs is None else [pairs(d, 0, n) for d, n in enumerate(lengths)]
    best: Partition | None = None
    for count in _counts(len(lengths)):
        candidate = _attempt(lengths, work_of, by_length, count, targets, pairs)
        if candidate is None:
            continue
        if best is None or candidate.imbalance < best.imbalance - 1e-12:
            best = candidate
        if candidate.imbalance <= tolerance:
            return candidate
    assert best is not None  # cutting every document always fits
    return best


def _uncut(lengths: Sequence[int], ranks: int, pairs: Pairs | None) -> Partition:
    """Longest document first, each to the rank that has the smallest share of tokens and work so far."""
    work_of = [_pairs(0, n) for n in lengths] if pairs is None else [pairs(d, 0, n) for d, n in enumerate(lengths)]
    token_weight, work_weight = 1 / max(sum(lengths), 1), 1 / max(sum(work_of), 1)
    placed: list[list[int]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    heap = [(0.0, i) for i in range(ranks)]
    for d in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        load, i = heapq.heappop(heap)
        placed[i].append(d)
        work[i] += work_of[d]
        heapq.heappush(heap, (load + lengths[d] * token_weight + work_of[d] * work_weight, i))
    return Partition(tuple(RankDocuments((), tuple(sorted(whole))) for whole in placed), (), tuple(work))


def _counts(n: int) -> list[int]:
    """How many of the longest documents to cut, in the order tried: 0..8, then half as many again each time, and all."""
    counts, c = list(range(min(n, 8) + 1)), 12
    while c < n:
        counts.append(c)
        c += c // 2
    return counts if counts[-1] == n else [*counts, n]


def _attempt(
    lengths: Sequence[int], work_of: list[int], by_length: list[int], count: int, targets: list[int], pairs: Pairs | None
) -> Partition | None:
    ranks = len(targets)
    needs = list(targets)
    whole: list[list[int]] = [[] for _ in targets]
    work = [0] * ranks
    whole_tokens = sum(lengths[d] for d in by_length[count:])
    whole_work = sum(work_of[d] for d in by_length[count:])
    token_weight, work_weight = 1 / max(whole_tokens, 1), 1 / max(whole_work, 1)
    heap = [(0.0, i) for i in range(ranks)]  # load = share of the whole documents' tokens + share of their work
    for d in by_length[count:]:
        length = lengths[d]
        skipped: list[tuple[float, int]] = []
        while heap and needs[heap[0][1]] < length:
            skipped.append(heapq.heappop(heap))
        if not heap:
            return None
        load, i = heapq.heappop(heap)
        whole[i].append(d)
        needs[i] -= length
        work[i] += work_of[d]
        heapq.heappush(heap, (load + length * token_weight + work_of[d] * work_weight, i))
        for item in skipped:
            heapq.heappush(heap, item)
    if count == 0 and any(needs):
        return None
    pieces: list[list[Piece]] = [[] for _ in targets]
    left = list(needs)
    mean = sum(work_of) / ranks
    for d in by_length[count - 1 :: -1] if count else []:  # the longest last: it compensates what the others leave uneven
        counts = _apportion(lengths[d], left)
        left = [a - b for a, b in zip(left, counts)]
        wanted = [mean - w for w in work] if d == by_length[0] else None
        if pairs is not None and wanted is None:
            wanted = [work_of[d] * n / lengths[d] for n in counts]
        for i, piece in _nest(d, lengths[d], counts, wanted, pairs):
            pieces[i].append(piece)
            work[i] += _pairs(piece.start, piece.stop) if pairs is None else pairs(d, piece.start, piece.stop)
    ordered = tuple(RankDocuments(tuple(sorted(p)), tuple(sorted(w))) for p, w in zip(pieces, whole))
    return Partition(ordered, tuple(sorted(by_length[:count])), tuple(work))


def _pairs(start: int, stop: int) -> int:
    """Causal pairs of queries `[start, stop)` with keys `[0, query]`."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def _apportion(length: int, left: list[int]) -> list[int]:
    """`length` tokens in proportion to `left` (largest remainder), never more than `left`."""
    total = sum(left)
    counts = [length * x // total for x in left]
    order = sorted(range(len(left)), key=lambda i: (-(length * left[i] % total), i))
    for i in order[: length - sum(counts)]:
        counts[i] += 1
    return counts


def _nest(document: int, length: int, counts: list[int], wanted: list[float] | None, pairs: Pairs | None) -> list[tuple[int, Piece]]:
    """One front and one back piece for each rank with `counts[i]` tokens, nested; adjacent pieces of one rank become one.

    `wanted`: the work that each rank should get, reached by moving tokens between its front and its back piece. When tokens `[a, b)` are
    not assigned yet, `n` tokens of which `f` are in front have `f (a - b + n) + n b - n (n - 1) / 2` pairs: linear in `f`. With
    `pairs` (a tree), `f` is searched.
    """
    nest = [i for i, n in enumerate(counts) if n]
    if wanted is not None:
        nest.sort(key=lambda i: (-wanted[i] / counts[i], i))  # the rank that needs most work per token gets the end of the document
    fronts: list[tuple[int, Piece]] = []
    backs: list[tuple[int, Piece]] = []
    a, b = 0, length
    for i in nest:
        n = counts[i]
        front = (n + 1) // 2
        if wanted is not None and b - a > n:
            if pairs is None:
                front = min(n, max(0, round((n * b - n * n / 2 + n / 2 - wanted[i]) / (b - a - n))))
            else:
                front = _front(document, a, b, n, wanted[i], pairs)
        if b - a == n:  # the innermost rank: one piece
            fronts.append((i, Piece(document, a, b)))
            break
        if front:
            fronts.append((i, Piece(document, a, a + front)))
        if n - front:
            backs.append((i, Piece(document, b - (n - front), b)))
        a, b = a + front, b - (n - front)
    return fronts + backs[::-1]


def _front(document: int, a: int, b: int, n: int, wanted: float, pairs: Pairs) -> int:
    """How many of `n` tokens a rank takes from the front of the tokens `[a, b)`, so that its work is `wanted` or just below; the rest is
    taken from the back. All or none where the work can't be reached."""

    def work(front: int) -> int:
        return pairs(document, a, a + front) + pairs(document, b - (n - front), b)

    low, high = 0, n  # work(low) > wanted >= work(high): bisection finds a crossing, also where the work is not monotonic
    if work(low) <= wanted:
        return low
    if work(high) > wanted:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if work(middle) > wanted:
            low = middle
        else:
            high = middle
    return high
