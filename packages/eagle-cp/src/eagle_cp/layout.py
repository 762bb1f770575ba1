"""Layout: which token of a pack lives on which rank, and all metadata that attention needs, computed once per batch on the host.

Every gather rank holds the same number of rows: pieces of shared documents first, then whole documents, then (rarely) a few pad rows,
fewer in the whole group than it has ranks, that nothing attends to. Its Ulysses ranks hold equal consecutive parts of those rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from eagle_cp.heads import HeadShare, split_heads
from eagle_cp.mesh import ContextMesh
from eagle_cp.partition import Partition, partition
from eagle_cp.segments import Segments, cumulative, integers, ranges
from eagle_cp.sharding import Shard, Unshard
from eagle_cp.shared import SharedPlan, make_steps

if TYPE_CHECKING:
    from eagle_cp.tiles import TilePlan


def check_cu_seqlens(cu_seqlens: torch.Tensor | Sequence[int]) -> tuple[int, ...]:
    """Cumulative lengths as ints: starts at 0, strictly rising. A CUDA tensor is copied to the host once, here."""
    values = integers("cu_seqlens", cu_seqlens)
    if len(values) < 2 or values[0] != 0:
        got = f"{list(values[:6])}{'...' if len(values) > 6 else ''}"
        raise ValueError(f"cu_seqlens: expected [0, end of document 0, ..., total], got {got}")
    for i, (a, b) in enumerate(pairwise(values)):
        if b <= a:
            raise ValueError(f"cu_seqlens: document {i} has length {b - a} ([{a}, {b})); leave empty documents out")
    return values


class AttentionPlan:
    """What one gather rank computes: `whole` documents, rows `[first, last)`, and its pieces of shared documents, rows `[0, first)`."""

    def __init__(self, whole: Segments | None, first: int, last: int, shared: SharedPlan | None, gathers: bool, rows: int):
        self.whole, self.first, self.last, self.shared = whole, first, last, shared
        self.gathers = gathers  # some document is shared, so every rank takes part in the gather, also one without a piece
        self.rows = rows


class Layout:
    """Made by `single` or `build`. Host values: `cu_seqlens`; `total` tokens of the pack; `local` rows on this rank (the same on every
    rank, pad rows included); `mesh`; `partition`; `heads`, the head shares of the Ulysses ranks (None: any number of heads)."""

    def __init__(self, cu_seqlens: tuple[int, ...], mesh: ContextMesh, heads: tuple[HeadShare, ...] | None, tolerance: float, verify: bool):
        self.cu_seqlens, self.mesh, self.heads, self.verify = cu_seqlens, mesh, heads, verify
        self.total = cu_seqlens[-1]
        self.lengths = tuple(b - a for a, b in pairwise(cu_seqlens))
        self.partition: Partition = partition(self.lengths, mesh.gather.size, tolerance=tolerance)
        self.rows = -(-self.total // mesh.size) * mesh.ulysses.size  # of a gather rank
        self.local = self.rows // mesh.ulysses.size
        self.pad = self.local * mesh.size - self.total
        self.tiles: TilePlan | None = None
        self._agreed: set[str] = set()
        self._plans: dict[bool, AttentionPlan] = {}
        self._order: dict[torch.device, torch.Tensor] = {}
        self._inverse: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def single(cls, cu_seqlens: torch.Tensor | Sequence[int]) -> Layout:
        """The layout of one rank that holds the whole pack: no mesh, no communication, `shard` and `unshard` are the identity."""
        return cls(check_cu_seqlens(cu_seqlens), ContextMesh.single(), None, 0.0, False)

    @classmethod
    def build(
        cls,
        cu_seqlens: torch.Tensor | Sequence[int],
        mesh: ContextMesh,
        *,
        num_heads: int,
        num_kv_heads: int,
        tolerance: float = 0.02,
        verify: bool = False,
    ) -> Layout:
        """The layout of a pack over `mesh`; every rank passes the same values. No communication, unless `verify`.

        `tolerance`: how far the attention work of the ranks may differ before more documents are shared. `verify`: small collectives
        (here, in `plan_tiles`, at the first `exchange_tiles` and the first attention) make sure that all ranks agree, and an error of one
        becomes an error of all instead of a hang.
        Raises ValueError for lengths that don't add up, or heads that can't be split."""
        problem, cu, heads = None, (), None
        try:
            cu = check_cu_seqlens(cu_seqlens)
            heads = split_heads(num_heads, num_kv_heads, mesh.ulysses.size)
        except ValueError as error:
            problem = str(error)
        if verify:
            agree(
                mesh,
                problem,
                f"{cu} {num_heads} {num_kv_heads} {tolerance}",
                "Layout.build: cu_seqlens, num_heads, num_kv_heads or tolerance",
            )
        if problem is not None:
            raise ValueError(problem)
        return cls(cu, mesh, heads, tolerance, verify)

    def check(self, where: str, problem: str | None, facts: object, what: str) -> None:
        """Raises ValueError for a `problem` of this rank; with `verify` on all ranks alike, also when the `facts` of some differ. The first
        call of each `where` communicates then."""
        if self.verify and where not in self._agreed:
            self._agreed.add(where)
            agree(self.mesh, problem, str(facts), f"{where}: {what}")
        if problem is not None:
            raise ValueError(problem)

    # Where tokens live

    def order(self, device: torch.device | None = None) -> torch.Tensor:
        """Token of every row of the group, `int64 [mesh.size * local]`, rank by rank; -1 is a pad row."""
        cpu = torch.device("cpu")
        if cpu not in self._order:
            parts = []
            for share in self.partition.shares:
                starts = [self.cu_seqlens[p.document] + p.start for p in share.pieces] + [self.cu_seqlens[d] for d in share.whole]
                lengths = [p.stop - p.start for p in share.pieces] + [self.lengths[d] for d in share.whole]
                parts.append(ranges(starts, lengths))
                parts.append(torch.full((self.rows - sum(lengths),), -1))
            self._order[cpu] = torch.cat(parts)
        device = device or cpu
        if device not in self._order:
            self._order[device] = self._order[cpu].to(device, non_blocking=True)
        return self._order[device]

    def local_tokens(self, device: torch.device | None = None) -> torch.Tensor:
        """Token of each local row, `int64 [local]`; -1 is a pad row."""
        first = self.mesh.rank * self.local
        return self.order(device)[first : first + self.local]

    def inverse(self, device: torch.device | None = None) -> torch.Tensor:
        """Row (of the whole group, rank by rank) of every token, `int64 [total]`."""
        cpu = torch.device("cpu")
        if cpu not in self._inverse:
            order = self.order()
            rows = (order >= 0).nonzero().flatten()
            self._inverse[cpu] = torch.empty(self.total, dtype=torch.int64).index_copy_(0, order[rows], rows)
        device = device or cpu
        if device not in self._inverse:
            self._inverse[device] = self._inverse[cpu].to(device, non_blocking=True)
        return self._inverse[device]

    def shard(self, x: torch.Tensor, dim: int = 0, *, fill: float = 0) -> torch.Tensor:
        """This rank's rows of `x`, which has the pack's `total` tokens along `dim`; pad rows get `fill` (give -100 for labels).

        Shift labels before sharding: a row's neighbour may be on another rank. Differentiable: the gradient of the tokens of other ranks
        is zero here."""
        if x.shape[dim] != self.total:
            raise ValueError(f"shard: dimension {dim} of {tuple(x.shape)} should have the pack's {self.total} tokens")
        return x if self.mesh.size == 1 else Shard.apply(x, self, dim, fill)

    def unshard(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The inverse of `shard`: all `total` tokens, in order, on every rank (one all-gather). Its gradient sums what all ranks send
        back."""
        if x.shape[dim] != self.local:
            raise ValueError(f"unshard: dimension {dim} of {tuple(x.shape)} should have this rank's {self.local} rows")
        return x if self.mesh.size == 1 else Unshard.apply(x, self, dim)

    # What attention needs

    def plan(self, causal: bool) -> AttentionPlan:
        """This gather rank's attention, made on first use."""
        if causal not in self._plans:
            self._plans[causal] = self._make_plan(causal)
        return self._plans[causal]

    def _make_plan(self, causal: bool) -> AttentionPlan:
        shares, shared = self.partition.shares, self.partition.shared
        mine = shares[self.mesh.gather.rank]
        first = sum(p.stop - p.start for p in mine.pieces)
        cu_whole = cumulative([self.lengths[d] for d in mine.whole])
        whole = Segments(cu_whole, cu_whole) if mine.whole else None
        last = first + cu_whole[-1]
        if not shared:
            return AttentionPlan(whole, first, last, None, False, self.rows)
        rows = max(sum(p.stop - p.start for p in share.pieces) for share in shares)
        base = dict(zip(shared, cumulative([self.lengths[d] for d in shared])))
        slot = torch.empty(sum(self.lengths[d] for d in shared), dtype=torch.int64)  # of a shared token, in [gather, 2, rows]
        for rank, share in enumerate(shares):
            starts = [base[p.document] + p.start for p in share.pieces]
            tokens = ranges(starts, [p.stop - p.start for p in share.pieces])
            slot[tokens] = torch.arange(len(tokens)) + rank * 2 * rows
        lengths_q, lengths_k, keys = [], [], []
        for p in mine.pieces:
            if not causal and keys and keys[-1] == base[p.document]:
                lengths_q[-1] += p.stop - p.start  # both pieces see the whole document: one segment
                continue
            lengths_q.append(p.stop - p.start)
            lengths_k.append(p.stop if causal else self.lengths[p.document])
            keys.append(base[p.document])
        segments = Segments(cumulative(lengths_q), cumulative(lengths_k))
        steps, picked = make_steps(lengths_q, lengths_k, keys, causal)
        plan = SharedPlan(segments, steps, slot[picked], rows, self.mesh.gather.size)
        return AttentionPlan(whole, first, last, plan, True, self.rows)

    def __repr__(self) -> str:
        return (
            f"Layout({len(self.lengths)} documents, {self.total} tokens,"
            f" {self.mesh.gather.size} gather x {self.mesh.ulysses.size} ulysses ranks,"
            f" {self.local} rows each, {len(self.partition.shared)} documents shared, imbalance {self.partition.imbalance:.1%})"
        )


def agree(mesh: ContextMesh, problem: str | None, facts: str, what: str) -> None:
    """Raises the same ValueError on every rank when one has a `problem`, or their `facts` differ. One collective of 520 bytes a rank."""
    digest = hashlib.sha256(facts.encode()).digest()[:8]
    text = (problem or "").encode()[:512]
    row = torch.tensor(list(digest + text.ljust(512, b"\0")), dtype=torch.uint8, device=mesh.device)
    rows = mesh.context.gather_rows(row).cpu()
    texts = [bytes(r[8:].tolist()).rstrip(b"\0").decode(errors="replace") for r in rows]
    failed = {i: t for i, t in enumerate(texts) if t}
    if failed:
        raise ValueError("; ".join(f"context rank {i}: {t}" for i, t in failed.items()))
    groups: dict[bytes, list[int]] = {}
    for i, r in enumerate(rows):
        groups.setdefault(bytes(r[:8].tolist()), []).append(i)
    if len(groups) > 1:
        parts = " / ".join(str(ranks) for ranks in groups.values())
        raise ValueError(f"{what} differ between context ranks: {parts} agree among themselves; every rank must pass the same values")
