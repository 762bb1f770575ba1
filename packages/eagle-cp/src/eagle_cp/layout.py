"""Layout: which token of a pack is on which rank, and the metadata of attention, computed once per batch on the host.

Every all-gather rank holds the same number of rows: pieces of cut documents first, then whole documents, then (rarely) a few pad rows,
fewer in the whole group than it has ranks, to which nothing attends. Its Ulysses ranks hold equal consecutive parts of those rows.
With `whole` no document is cut, attention communicates nothing, and all ranks have as many rows as the one with most tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from eagle_cp.heads import HeadShare, split_heads
from eagle_cp.mesh import ContextMesh
from eagle_cp.partition import Partition, partition
from eagle_cp.rank_attention import RankAttention, make_rank_attention
from eagle_cp.segments import int_list, integers, ranges
from eagle_cp.trees import check_prefixes, position_ids


def check_cu_seqlens(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Cumulative lengths as ints: the first is 0, and they increase strictly. A CUDA tensor is copied to the host once, here."""
    values = integers("cu_seqlens", cu_seqlens)
    if len(values) < 2 or values[0] != 0:
        got = f"{list(values[:6])}{'...' if len(values) > 6 else ''}"
        raise ValueError(f"cu_seqlens: expected [0, end of document 0, ..., total], got {got}")
    for i, (a, b) in enumerate(pairwise(values)):
        if b <= a:
            raise ValueError(f"cu_seqlens: document {i} has length {b - a} ([{a}, {b})); leave empty documents out")
    return values


class Layout:
    """Made by `single` or `build`.

    Attributes, on the host: `cu_seqlens`; `lengths` of the documents; `prefixes`, the document that each one continues (empty: no document
    has a prefix); `longest`, tokens of the longest document, with its prefix; `total` tokens of the pack; `local` rows of this rank (the
    same on every rank, pad rows included); `pad`, pad rows of all ranks; `mesh`; `partition`; `heads`, the head shares of the Ulysses ranks
    (None: any number of heads)."""

    def __init__(
        self,
        cu_seqlens: tuple[int, ...],
        prefixes: tuple[int, ...],
        mesh: ContextMesh,
        heads: tuple[HeadShare, ...] | None,
        tolerance: float,
        verify: bool,
        whole: bool = False,
    ):
        self.cu_seqlens, self.prefixes, self.mesh, self.heads, self.verify = cu_seqlens, prefixes, mesh, heads, verify
        self.total = cu_seqlens[-1]
        self.lengths = tuple(b - a for a, b in pairwise(cu_seqlens))
        self.longest = max(self.lengths)
        if prefixes:
            self.longest = max(n + (self.lengths[p] if p >= 0 else 0) for n, p in zip(self.lengths, prefixes))
        self.partition: Partition = partition(self.lengths, mesh.all_gather.size, tolerance=tolerance, prefixes=prefixes, whole=whole)
        self.rows = -(-self.total // mesh.size) * mesh.ulysses.size  # of an all-gather rank
        if whole:
            self.rows = -(-max(self.partition.rank_tokens(self.lengths)) // mesh.ulysses.size) * mesh.ulysses.size
        self.local = self.rows // mesh.ulysses.size
        self.pad = self.local * mesh.size - self.total
        self._agreed: set[str] = set()
        self._rank_attention: dict[bool, RankAttention] = {}
        self._order: dict[torch.device, Tensor] = {}
        self._inverse: dict[torch.device, Tensor] = {}

    @classmethod
    def single(cls, cu_seqlens: Tensor | Sequence[int], prefixes: Tensor | Sequence[int] | None = None) -> Layout:
        """The layout of one rank that holds the whole pack: no communication, and `shard` and `unshard` are the identity.

        Arguments and errors are those of `build`."""
        cu = check_cu_seqlens(cu_seqlens)
        return cls(cu, check_prefixes(prefixes, len(cu) - 1), ContextMesh.single(), None, 0.0, False)

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        mesh: ContextMesh,
        *,
        num_heads: int,
        num_kv_heads: int,
        prefixes: Tensor | Sequence[int] | None = None,
        tolerance: float = 0.02,
        whole: bool = False,
        verify: bool = False,
    ) -> Layout:
        """The layout of a pack over `mesh`. Every rank passes the same values. No communication, except with `verify`.

        cu_seqlens: cumulative lengths of the documents, `[documents + 1]`, in tokens.
        prefixes: for trees, `[documents]`: the document that each one continues, or -1. A branch directly follows its prefix or another
            branch of it, and attends to the whole prefix and to itself. Default: no document has a prefix.
        tolerance: how much the attention work of the ranks may differ (largest over mean, minus 1) before more documents are cut.
        whole: no document is cut over all-gather ranks; a rank may have no token. Good for packs of many short documents (`plan_context`).
        verify: small collectives (here, in `plan_tiles`, and in the first `exchange_tiles` and the first `attention`) check that all ranks
            agree. An error of one rank is then raised on all of them, instead of a hang.

        Raises ValueError for lengths that do not increase, for prefixes that are not trees of one level, and for heads that can't be split
        over the Ulysses ranks."""
        problem: str | None = None
        cu: tuple[int, ...] = ()
        continued: tuple[int, ...] = ()
        heads: tuple[HeadShare, ...] | None = None
        try:
            cu = check_cu_seqlens(cu_seqlens)
            continued = check_prefixes(prefixes, len(cu) - 1)
            heads = split_heads(num_heads, num_kv_heads, mesh.ulysses.size)
        except ValueError as error:
            problem = str(error)
        if verify:
            agree(
                mesh,
                problem,
                f"{cu} {continued} {num_heads} {num_kv_heads} {tolerance} {whole}",
                "Layout.build: cu_seqlens, prefixes, num_heads, num_kv_heads, tolerance or whole",
            )
        if problem is not None:
            raise ValueError(problem)
        return cls(cu, continued, mesh, heads, tolerance, verify, whole)

    def check(self, where: str, problem: str | None, facts: object, what: str) -> None:
        """Raises ValueError for a `problem` of this rank. With `verify`, the first call for each `where` communicates, and all ranks raise
        when one has a problem or their `facts` differ (`what` names the facts)."""
        if self.verify and where not in self._agreed:
            self._agreed.add(where)
            agree(self.mesh, problem, str(facts), f"{where}: {what}")
        if problem is not None:
            raise ValueError(problem)

    # Rows and tokens

    def order(self, device: torch.device | None = None) -> Tensor:
        """Token of every row of the group, `int64 [mesh.size * local]`, rank by rank; -1 is a pad row."""
        cpu = torch.device("cpu")
        if cpu not in self._order:
            parts: list[Tensor] = []
            for documents in self.partition.ranks:
                starts = [self.cu_seqlens[p.document] + p.start for p in documents.pieces]
                starts += [self.cu_seqlens[d] for d in documents.whole]
                lengths = [p.stop - p.start for p in documents.pieces] + [self.lengths[d] for d in documents.whole]
                parts.append(ranges(starts, lengths))
                parts.append(torch.full((self.rows - sum(lengths),), -1))
            self._order[cpu] = torch.cat(parts)
        device = device or cpu
        if device not in self._order:
            self._order[device] = self._order[cpu].to(device, non_blocking=True)
        return self._order[device]

    def local_tokens(self, device: torch.device | None = None) -> Tensor:
        """Token of each local row, `int64 [local]`; -1 is a pad row."""
        first = self.mesh.rank * self.local
        return self.order(device)[first : first + self.local]

    def inverse(self, device: torch.device | None = None) -> Tensor:
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

    def position_ids(self) -> Tensor:
        """Position of every token in its document, `int64 [total]`, on the CPU; that of a branch continues from the end of its prefix."""
        return position_ids(self.cu_seqlens, self.prefixes)

    def shard(self, x: Tensor, dim: int = 0, *, fill: float = 0) -> Tensor:
        """This rank's rows of `x`, which has the pack's `total` tokens along `dim`, or ValueError is raised; pad rows get `fill` (-100 for
        labels). Not a copy on one rank.

        Shift labels before sharding, because the neighbour of a row may be on another rank. Differentiable: the gradient of tokens of
        other ranks is zero here."""
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != self.total:
            raise ValueError(f"shard: dimension {dim} of {tuple(x.shape)} should have the pack's {self.total} tokens")
        if self.mesh.size == 1:
            return x
        return cast(Tensor, _Shard.apply(x, self, dim, fill))  # pyright: ignore[reportUnknownMemberType]

    def unshard(self, x: Tensor, dim: int = 0) -> Tensor:
        """The inverse of `shard`: all `total` tokens in order on every rank, by one all-gather. Its backward sums the gradients of all
        ranks. Raises ValueError unless `x` has `local` rows along `dim`."""
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != self.local:
            raise ValueError(f"unshard: dimension {dim} of {tuple(x.shape)} should have this rank's {self.local} rows")
        if self.mesh.size == 1:
            return x
        return cast(Tensor, _Unshard.apply(x, self, dim))  # pyright: ignore[reportUnknownMemberType]

    # Attention

    def rank_attention(self, causal: bool) -> RankAttention:
        """What this all-gather rank computes; made on first use."""
        if causal not in self._rank_attention:
            self._rank_attention[causal] = make_rank_attention(
                self.lengths, self.partition, self.mesh.all_gather.rank, causal, self.prefixes
            )
        return self._rank_attention[causal]

    def __repr__(self) -> str:
        branches = sum(p >= 0 for p in self.prefixes)
        return (
            f"Layout({len(self.lengths)} documents,{f' {branches} of them branches,' if branches else ''} {self.total} tokens,"
            f" {self.mesh.all_gather.size} all_gather x {self.mesh.ulysses.size} ulysses ranks,"
            f" {self.local} rows each, {len(self.partition.cut)} documents cut, imbalance {self.partition.imbalance:.1%})"
        )


class _ShardCtx(FunctionCtx):
    layout: Layout
    dim: int
    shape: torch.Size


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ShardCtx, x: Tensor, layout: Layout, dim: int, fill: float) -> Tensor:
        ctx.layout, ctx.dim, ctx.shape = layout, dim, x.shape
        tokens = layout.local_tokens(x.device)
        if layout.pad == 0:
            return x.index_select(dim, tokens)
        local = x.index_select(dim, tokens.clamp(min=0))
        pad = (tokens < 0).view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
        return local.masked_fill(pad, fill)

    @staticmethod
    def backward(ctx: _ShardCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens = ctx.layout.local_tokens(grad.device)
        if ctx.layout.pad:
            real = _real_rows(ctx.layout, grad.device)
            tokens, grad = tokens.index_select(0, real), grad.index_select(ctx.dim, real)
        return grad.new_zeros(ctx.shape).index_copy(ctx.dim, tokens, grad), None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ShardCtx, x: Tensor, layout: Layout, dim: int) -> Tensor:
        ctx.layout, ctx.dim = layout, dim
        rows = x.movedim(dim, 0).contiguous()
        gathered = rows.new_empty((layout.mesh.size, *rows.shape))
        layout.mesh.context.all_gather(gathered, rows).wait()
        return gathered.flatten(0, 1).index_select(0, layout.inverse(x.device)).movedim(0, dim)

    @staticmethod
    def backward(ctx: _ShardCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layout = ctx.layout
        grad = grad.movedim(ctx.dim, 0)
        rows = grad.new_zeros((layout.mesh.size * layout.local, *grad.shape[1:]))
        rows.index_copy_(0, layout.inverse(grad.device), grad)
        mine = rows.new_empty((layout.local, *grad.shape[1:]))
        layout.mesh.context.reduce_scatter(mine, rows.view(layout.mesh.size, layout.local, *grad.shape[1:])).wait()
        return mine.movedim(0, ctx.dim), None, None


def _real_rows(layout: Layout, device: torch.device) -> Tensor:
    """Local rows that hold a token, from the host's copy: no synchronisation."""
    return (layout.local_tokens() >= 0).nonzero().flatten().to(device, non_blocking=True)


def agree(mesh: ContextMesh, problem: str | None, facts: str, what: str) -> None:
    """Raises the same ValueError on every rank when one has a `problem`, or their `facts` differ. One collective of 520 bytes a rank."""
    digest = hashlib.sha256(facts.encode()).digest()[:8]
    text = (problem or "").encode()[:512]
    row = torch.tensor(list(digest + text.ljust(512, b"\0")), dtype=torch.uint8, device=mesh.device)
    facts_and_texts = [bytes(int_list(other)) for other in mesh.context.all_gather_rows(row).cpu()]
    texts = [data[8:].rstrip(b"\0").decode(errors="replace") for data in facts_and_texts]
    failed = {i: t for i, t in enumerate(texts) if t}
    if failed:
        raise ValueError("; ".join(f"context rank {i}: {t}" for i, t in failed.items()))
    groups: dict[bytes, list[int]] = {}
    for i, data in enumerate(facts_and_texts):
        groups.setdefault(data[:8], []).append(i)
    if len(groups) > 1:
        parts = " / ".join(str(ranks) for ranks in groups.values())
        raise ValueError(f"{what} differ between context ranks: {parts} agree among themselves; every rank must pass the same values")
