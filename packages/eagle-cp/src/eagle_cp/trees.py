"""Trees: documents that share a prefix. A branch attends to its prefix and to itself, not to the other branches of the prefix.

The prefix and its branches are documents of the pack, one after the other: `prefixes[i]` is the document that document `i` continues, or
-1. Attention of a branch is computed in two parts, both exact: over itself, as that of any document, and over its prefix, without a mask,
with the queries of all branches of a prefix in one segment. The parts are merged by their log-sum-exps (Dao et al., FlashAttention-2,
section 3.1). So keys and values of a prefix are neither repeated nor gathered once more for each branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from eagle_cp.segments import cumulative, integers

Pairs = Callable[[int, int, int], int]  # (document, start, stop) -> attended pairs of its queries [start, stop), causal, one head


def check_prefixes(prefixes: Tensor | Sequence[int] | None, documents: int) -> tuple[int, ...]:
    """`prefixes` as ints; empty when no document has a prefix. Raises ValueError for another number of them, for a prefix that has a prefix
    itself, and for a branch that does not directly follow its prefix or another branch of it."""
    if prefixes is None:
        return ()
    values = integers("prefixes", prefixes)
    if len(values) != documents:
        raise ValueError(f"prefixes: {len(values)} numbers for {documents} documents; give one for each, -1 where there is no prefix")
    for i, p in enumerate(values):
        if p == -1:
            continue
        if not 0 <= p < i:
            raise ValueError(f"prefixes: document {i} continues document {p}; a prefix comes before its branches (-1: no prefix)")
        if values[p] != -1:
            raise ValueError(f"prefixes: document {i} continues document {p}, which has a prefix itself; trees have one level of branches")
        if p != i - 1 and values[i - 1] != p:
            raise ValueError(
                f"prefixes: document {i} continues document {p}, but document {i - 1} is between them; put the branches of a prefix"
                " directly behind it"
            )
    return values if any(p >= 0 for p in values) else ()


def trees(prefixes: Sequence[int]) -> list[range]:
    """The documents of every tree; a document without branches is a tree of its own."""
    firsts = [i for i, p in enumerate(prefixes) if p < 0]
    return [range(a, b) for a, b in pairwise([*firsts, len(prefixes)])]


def position_ids(cu_seqlens: Sequence[int], prefixes: Sequence[int]) -> Tensor:
    """Position of every token, `int64 [total]`: restarts with every document; that of a branch continues from the end of its prefix."""
    lengths = torch.tensor([b - a for a, b in pairwise(cu_seqlens)])
    starts = torch.tensor(cu_seqlens[:-1])
    if prefixes:
        starts -= torch.tensor([int(lengths[p]) if p >= 0 else 0 for p in prefixes])
    return torch.arange(cu_seqlens[-1]) - starts.repeat_interleave(lengths)


def tree_pairs(lengths: Sequence[int], groups: Sequence[range]) -> Pairs:
    """The work of trees: `lengths` of the documents, `groups` the documents of every tree. A tree is addressed by its number, and by tokens
    from the first of its prefix."""
    # Of every document of a tree: first token, keys before it, pairs of the tokens before it.
    parts: list[list[tuple[int, int, int]]] = []
    for group in groups:
        prefix, work = lengths[group[0]], 0
        described: list[tuple[int, int, int]] = []
        for i, first in zip(group, cumulative([lengths[i] for i in group])):
            before = prefix if i != group[0] else 0
            described.append((first, before, work))
            work += lengths[i] * before + lengths[i] * (lengths[i] + 1) // 2
        parts.append(described)

    def until(tree: int, token: int) -> int:
        first, before, work = parts[tree][_last_before(parts[tree], token)]
        n = token - first
        return work + n * before + n * (n + 1) // 2

    return lambda tree, start, stop: until(tree, stop) - until(tree, start)


def _last_before(parts: list[tuple[int, int, int]], token: int) -> int:
    """Index of the last part that starts at `token` or before."""
    low, high = 0, len(parts)
    while high - low > 1:
        middle = (low + high) // 2
        if parts[middle][0] <= token:
            low = middle
        else:
            high = middle
    return low
