"""The inner level, Ulysses (Jacobs et al., DeepSpeed Ulysses): all-to-all between "this rank's tokens, all heads" and "all tokens of the
all-gather rank, this rank's heads"."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from eagle_cp.collectives import Group
from eagle_cp.heads import HeadShare


def to_heads(group: Group, shares: tuple[HeadShare, ...], parts: Sequence[Tensor], kinds: str) -> Tensor:
    """`parts`: tensors `[local, H, D]`. `kinds`: one letter for each part, "q" for query heads and "k" for key/value heads. Returns `[rows,
    heads of this rank, D]`, the parts concatenated along the heads. One collective."""
    local, dim = parts[0].shape[0], parts[0].shape[2]
    spans, counts = _spans(shares, kinds)
    send = parts[0].new_empty(local * sum(counts) * dim)
    at = 0
    for span, count in zip(spans, counts):
        block = send[at : at + local * count * dim].view(local, count, dim)
        at += local * count * dim
        head = 0
        for part, (a, b) in zip(parts, span):
            _copy(block[:, head : head + b - a], part[:, a:b])
            head += b - a
    mine = counts[group.rank]
    received = send.new_empty(local * group.size * mine * dim)
    splits = [local * count * dim for count in counts]
    group.all_to_all(received, send, [local * mine * dim] * group.size, splits).wait()
    return received.view(local * group.size, mine, dim)


def to_tokens(group: Group, shares: tuple[HeadShare, ...], x: Tensor, kinds: str, wholes: Sequence[Tensor]) -> None:
    """The reverse of `to_heads`: writes `x: [rows, heads of this rank, D]` into `wholes: [local, H, D]`, one for each letter of `kinds`.
    Heads that several ranks had are summed in the dtype of `x`. One collective."""
    rows, _, dim = x.shape
    local = rows // group.size
    spans, counts = _spans(shares, kinds)
    received = x.new_empty(local * sum(counts) * dim)
    splits = [local * count * dim for count in counts]
    group.all_to_all(received, x.reshape(-1), splits, [local * x.shape[1] * dim] * group.size).wait()
    done = [0] * len(kinds)  # heads below this one are written
    at = 0
    for span, count in zip(spans, counts):
        block = received[at : at + local * count * dim].view(local, count, dim)
        at += local * count * dim
        head = 0
        for i, (whole, (a, b)) in enumerate(zip(wholes, span)):
            again = max(0, min(b, done[i]) - a)
            if again:
                whole[:, a : a + again].add_(block[:, head : head + again])
            _copy(whole[:, a + again : b], block[:, head + again : head + b - a])
            done[i] = max(done[i], b)
            head += b - a


def _spans(shares: tuple[HeadShare, ...], kinds: str) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """For each Ulysses rank: its range of heads for each letter of `kinds`, and the number of its heads."""
    spans = [[(s.q0, s.q1) if kind == "q" else (s.k0, s.k1) for kind in kinds] for s in shares]
    return spans, [sum(b - a for a, b in span) for span in spans]


def _copy(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)` for `[rows, heads, D]` slices, 16 bytes at a time where both are aligned (torch copies strided bf16 element
    by element)."""
    if target.dtype == source.dtype and _aligned(target) and _aligned(source):
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _aligned(x: Tensor) -> bool:
    unit = 16 // x.element_size()
    return x.stride(-1) == 1 and all(n % unit == 0 for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))


def repeats_kv(shares: tuple[HeadShare, ...]) -> bool:
    """Whether some key/value head is on several ranks, so that its gradient is a sum."""
    return any(a.k1 > b.k0 for a, b in itertools.pairwise(shares))
