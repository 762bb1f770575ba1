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
    segments: all pieces as one packed problem.
    """

    def __init__(self, segments: Segments, calls: tuple[KernelCall, ...], index: Tensor, rows: int, ranks: int):
        self.segments, self.calls, self.rows, self.ranks = segments, calls, rows, ranks
        self.keys = len(index)
        self._index = {torch.device("cpu"): torch.cat((index, index + rows))}

    def index(self, device: torch.device) -> Tensor:
        if device not in self._index:
            self._index[device] = self._index[torch.device("cpu")].to(device, non_blocking=True)
        return self._index[device]


class RankAttention(NamedTuple):
    """The attention of one all-gather rank: pieces of cut documents in rows `[0, first)`, whole documents in rows `[first, last)`, then
    pad rows. `pieces` is None when no document is cut; otherwise every rank takes part in the all-gather, also one without a piece."""

    whole: Segments | None
    pieces: PieceAttention | None
    first: int
    last: int


def make_rank_attention(lengths: Sequence[int], partition: Partition, rank: int, causal: bool) -> RankAttention:
    """The attention of all-gather rank `rank` for documents of `lengths` tokens."""
    mine = partition.ranks[rank]
    first = mine.piece_tokens
    cu_whole = cumulative([lengths[d] for d in mine.whole])
    whole = Segments(cu_whole, cu_whole) if mine.whole else None
    last = first + cu_whole[-1]
    if not partition.cut:
        return RankAttention(whole, None, first, last)
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
    calls, selected = make_calls(lengths_q, lengths_k, keys, causal)
    return RankAttention(whole, PieceAttention(segments, calls, slot[selected], rows, len(partition.ranks)), first, last)


def make_calls(lengths_q: list[int], lengths_k: list[int], keys: list[int], causal: bool) -> tuple[tuple[KernelCall, ...], Tensor]:
    """The kernel calls for segments of `lengths_q` queries in order and `lengths_k` keys that start at `keys`; and which keys to select.

    A long segment is a call of its own on a slice of the keys of its document, which are selected once. One longer than 0.6 of the rank's
    rows becomes two calls, so that the kernel's float32 accumulators of dQ cover about half of the rows at most. Consecutive short
    segments share a call, for which their keys are selected segment by segment, some keys twice."""
    total = sum(lengths_q)
    long: dict[int, int] = {}
    for nq, nk, key in zip(lengths_q, lengths_k, keys):
        if nq >= LONG_PIECE:
            long[key] = max(nk, long.get(key, 0))
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
    return tuple(sorted(calls, key=lambda call: call.keys.start - call.keys.stop)), torch.cat(selected)
