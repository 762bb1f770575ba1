"""What one all-gather rank computes: attention of the documents that it holds whole, and of its pieces of cut documents over gathered
keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_cp.partition import Partition
from eagle_cp.segments import Segments, cumulative, ranges

# Queries from which a piece gets a kernel call of its own: 28 heads of 4096 queries are 7 rounds of a Hopper's 132 multiprocessors.
LONG_PIECE = 4096


class Rows:
    """Rows of a tensor: a slice where they follow one another, so that selecting them copies nothing, else an index."""

    def __init__(self, index: Tensor):
        first = int(index[0])
        self._slice = slice(first, first + len(index)) if bool((index.diff() == 1).all()) else None
        self._on = {torch.device("cpu"): index}

    def on(self, device: torch.device) -> slice | Tensor:
        if self._slice is not None:
            return self._slice
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device, non_blocking=True)
        return self._on[device]


class PrefixCall(NamedTuple):
    """One kernel call of branches over their prefixes, without a mask: rows `queries` with the rows `keys`, a segment for every tree.
    No key is in two segments."""

    queries: Rows
    keys: Rows
    segments: Segments


class KernelCall(NamedTuple):
    """One kernel call: the rank's rows `queries` with the selected keys `keys`. `unique`: no key is in two of its segments."""

    queries: slice
    keys: slice
    segments: Segments
    unique: bool


class PieceAttention:
    """Attention of one rank's pieces of cut documents over the gathered keys and values `[ranks, 2, rows, heads, D]`.

    rows: rows that every rank sends, those of the longest rank (a shorter rank fills up with other rows of its own, which are not read).
    index: selects `keys` keys, then their values, from the gathered rows.
    calls: the kernel calls, those with most keys first.
    segments: all pieces as one packed problem, without the prefixes of branches.
    prefix_calls: pieces of branches over their prefixes, among the selected keys.
    """

    def __init__(
        self, segments: Segments, calls: tuple[KernelCall, ...], prefix_calls: tuple[PrefixCall, ...], index: Tensor, rows: int, ranks: int
    ):
        self.segments, self.calls, self.prefix_calls, self.rows, self.ranks = segments, calls, prefix_calls, rows, ranks
        self.keys = len(index)
        self._index = {torch.device("cpu"): torch.cat((index, index + rows))}

    def index(self, device: torch.device) -> Tensor:
        if device not in self._index:
            self._index[device] = self._index[torch.device("cpu")].to(device, non_blocking=True)
        return self._index[device]


class RankAttention(NamedTuple):
    """The attention of one all-gather rank: pieces of cut documents in rows `[0, first)`, whole documents in rows `[first, last)`, then
    pad rows. `pieces` is None when no document is cut; otherwise every rank takes part in the all-gather, also one without a piece.
    `whole_prefixes`: branches of whole trees over their prefixes, in rows counted from `first`."""

    whole: Segments | None
    whole_prefixes: PrefixCall | None
    pieces: PieceAttention | None
    first: int
    last: int

    @property
    def prefix_segments(self) -> Segments | None:
        """The segments of the longest call over prefixes; None: no branch is on this rank."""
        calls = [*([self.whole_prefixes] if self.whole_prefixes else []), *(self.pieces.prefix_calls if self.pieces else ())]
        return max((call.segments for call in calls), key=lambda s: s.pairs(False), default=None)


class _Crossing(NamedTuple):
    """Query rows `[row, row + queries)`, of branches of one prefix, with all its keys `[key, key + keys)`."""

    row: int
    queries: int
    key: int
    keys: int


def make_rank_attention(
    lengths: Sequence[int], partition: Partition, rank: int, causal: bool, prefixes: Sequence[int] = ()
) -> RankAttention:
    """The attention of all-gather rank `rank` for documents of `lengths` tokens; `prefixes`: the document that each one continues, or
    -1."""
    mine = partition.ranks[rank]
    first = mine.piece_tokens
    cu_whole = cumulative([lengths[d] for d in mine.whole])
    whole = Segments(cu_whole, cu_whole) if mine.whole else None
    last = first + cu_whole[-1]
    whole_prefixes = None
    if prefixes:
        rows_of = dict(zip(mine.whole, cu_whole))
        spans = [(d, rows_of[d], lengths[d]) for d in mine.whole]
        whole_prefixes = _prefix_call(_crossings(spans, prefixes, rows_of, lengths))
    if not partition.cut:
        return RankAttention(whole, whole_prefixes, None, first, last)
    rows = max(documents.piece_tokens for documents in partition.ranks)
    base = dict(zip(partition.cut, cumulative([lengths[d] for d in partition.cut])))
    slot = torch.empty(sum(lengths[d] for d in partition.cut), dtype=torch.int64)  # of a cut document's token, in [ranks, 2, rows]
    for i, documents in enumerate(partition.ranks):
        starts = [base[p.document] + p.start for p in documents.pieces]
        tokens = ranges(starts, [p.stop - p.start for p in documents.pieces])
        slot[tokens] = torch.arange(len(tokens)) + i * 2 * rows
    lengths_q: list[int] = []
    lengths_k: list[int] = []
    keys: list[int] = []
    for p in mine.pieces:
        if not causal and keys and keys[-1] == base[p.document]:
            lengths_q[-1] += p.stop - p.start  # both pieces attend to the whole document: one segment
            continue
        lengths_q.append(p.stop - p.start)
        lengths_k.append(p.stop if causal else lengths[p.document])
        keys.append(base[p.document])
    segments = Segments(cumulative(lengths_q), cumulative(lengths_k))
    crossings: list[_Crossing] = []
    if prefixes:
        cu_pieces = cumulative([p.stop - p.start for p in mine.pieces])
        spans = [(p.document, row, p.stop - p.start) for p, row in zip(mine.pieces, cu_pieces)]
        crossings = _crossings(spans, prefixes, base, lengths)
    calls, prefix_calls, selected = make_calls(lengths_q, lengths_k, keys, causal, crossings)
    pieces = PieceAttention(segments, calls, prefix_calls, slot[selected], rows, len(partition.ranks))
    return RankAttention(whole, whole_prefixes, pieces, first, last)


def _crossings(spans: list[tuple[int, int, int]], prefixes: Sequence[int], keys: dict[int, int], lengths: Sequence[int]) -> list[_Crossing]:
    """For every prefix whose branches have queries among `spans`, (document, first row, rows) in ascending order: these queries, and the
    keys, which start at `keys[prefix]`."""
    found: list[_Crossing] = []
    for d, row, n in spans:
        prefix = prefixes[d]
        if prefix < 0:
            continue
        if found and found[-1].key == keys[prefix]:  # rows of one tree follow one another
            found[-1] = found[-1]._replace(queries=found[-1].queries + n)
        else:
            found.append(_Crossing(row, n, keys[prefix], lengths[prefix]))
    return found


def _prefix_call(crossings: list[_Crossing]) -> PrefixCall | None:
    """One kernel call for all `crossings`."""
    if not crossings:
        return None
    queries, counts = [c.queries for c in crossings], [c.keys for c in crossings]
    return PrefixCall(
        Rows(ranges([c.row for c in crossings], queries)),
        Rows(ranges([c.key for c in crossings], counts)),
        Segments(cumulative(queries), cumulative(counts), aligned=False),
    )


def make_calls(
    lengths_q: list[int], lengths_k: list[int], keys: list[int], causal: bool, crossings: list[_Crossing]
) -> tuple[tuple[KernelCall, ...], tuple[PrefixCall, ...], Tensor]:
    """The kernel calls for segments of `lengths_q` queries in order and `lengths_k` keys that start at `keys`; those for `crossings`; and
    which keys to select.

    A long segment is a call of its own on a slice of the keys of its document, which are selected once. One longer than 0.6 of the rank's
    rows becomes two calls, so that the kernel's float32 accumulators of dQ cover about half of the rows at most. Consecutive short
    segments share a call, for which their keys are selected segment by segment, some keys twice. A prefix that a long piece selects is
    a call of its own for its branches; the other prefixes share one."""
    total = sum(lengths_q)
    long: dict[int, int] = {}
    for nq, nk, key in zip(lengths_q, lengths_k, keys):
        if nq >= LONG_PIECE:
            long[key] = max(nk, long.get(key, 0))
    for c in crossings:
        if c.key in long:
            long[c.key] = c.keys
    place = dict(zip(long, cumulative(list(long.values()))))  # of a long document's first key among the selected ones
    selected = [ranges(list(long), list(long.values()))]
    keys_selected = sum(long.values())
    calls: list[KernelCall] = []
    run: list[tuple[int, int]] = []  # short segments since the last long one
    row = 0

    def add_call(lengths: list[tuple[int, int]], stop: int, first_key: int, unique: bool) -> None:
        cu_q, cu_k = (cumulative(n) for n in zip(*lengths))
        calls.append(KernelCall(slice(stop - cu_q[-1], stop), slice(first_key, first_key + cu_k[-1]), Segments(cu_q, cu_k), unique))

    def end_run() -> None:
        nonlocal keys_selected
        if run:
            add_call(run, row, keys_selected, False)
            keys_selected += sum(nk for _, nk in run)
            run.clear()

    for nq, nk, key in zip(lengths_q, lengths_k, keys):
        if nq < LONG_PIECE:
            run.append((nq, nk))
            selected.append(torch.arange(key, key + nk))
            row += nq
            continue
        end_run()
        cut = nq // 2 if nq >= 2 * LONG_PIECE and nq > 0.6 * total else 0
        if cut:
            add_call([(cut, nk - (nq - cut) if causal else nk)], row + cut, place[key], True)
        row += nq
        add_call([(nq - cut, nk)], row, place[key], True)
    end_run()
    prefix_calls = [_prefix_call([c._replace(key=place[c.key])]) for c in crossings if c.key in place]
    shared: list[_Crossing] = []
    for c in crossings:
        if c.key not in place:
            shared.append(c._replace(key=keys_selected))
            selected.append(torch.arange(c.key, c.key + c.keys))
            keys_selected += c.keys
    prefix_calls.append(_prefix_call(shared))
    ordered = tuple(sorted(calls, key=lambda call: call.keys.start - call.keys.stop))
    return ordered, tuple(call for call in prefix_calls if call is not None), torch.cat(selected)
