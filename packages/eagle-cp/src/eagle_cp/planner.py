"""Which split `ulysses x all_gather` of the ranks is fastest for a pack, estimated without a GPU: kernel time, bytes over the links, peak
memory. `whole` is the split that cuts no document: nothing is communicated, and ranks wait for the one with most tokens.

The default rates were measured on H200 with flash-attn-4 (benchmarks/results); pass the rates of other hardware. The estimate is for one
attention layer, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eagle_cp.all_gather import HEADWISE_ROWS, OVERLAP
from eagle_cp.heads import split_heads
from eagle_cp.partition import Partition, RankDocuments, partition
from eagle_cp.segments import integers
from eagle_cp.trees import check_prefixes


class Hardware(NamedTuple):
    """Rates of one GPU and its links. `half_length`: documents of that many tokens reach half of the kernel's rate. `host_gb_s` and
    `network_gb_s`: GB/s that a rank sends to ranks of its own host, and of other hosts. `launch_ms`: time of an attention layer, forward
    and backward, in addition to its kernels. `linear_tflops`: of the linear layers."""

    forward_tflops: float = 647.0
    backward_tflops: float = 605.0
    half_length: float = 880.0
    copy_gb_s: float = 4000.0
    host_gb_s: float = 236.0
    network_gb_s: float = 45.0
    gpus_per_host: int = 8
    launch_ms: float = 0.3
    linear_tflops: float = 700.0


class Candidate(NamedTuple):
    """One split, for one attention layer, forward and backward. Times in ms; `exposed_ms`: collectives and copies that are not overlapped.
    `ulysses_mb`, `all_gather_mb`: 10^6 bytes sent per rank. `peak_mib`: peak memory of a rank in MiB. `imbalance`: largest work of a rank
    over the mean, minus 1. `reason`: why the split can't be used, or empty. `whole`: no document is cut. `waiting_ms`: time of the linear
    layers for rows beyond an equal share."""

    ulysses: int
    all_gather: int
    compute_ms: float
    exposed_ms: float
    ulysses_mb: float
    all_gather_mb: float
    peak_mib: float
    imbalance: float
    reason: str
    whole: bool = False
    waiting_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.exposed_ms + self.waiting_ms


class ContextPlan(NamedTuple):
    """The fastest split `ulysses x all_gather`, and all candidates, fastest first. `whole`: an argument of `Layout.build`."""

    ulysses: int
    all_gather: int
    candidates: tuple[Candidate, ...]
    tokens: int
    documents: int
    whole: bool = False


WHOLE_ROWS = 1.05
"""Rows of a rank over an equal share, at most, where no document is cut: the memory of a step grows with them."""


def plan_context(
    lengths: Sequence[int],
    ranks: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    prefixes: Sequence[int] | None = None,
    hardware: Hardware | None = None,
    memory_gib: float | None = None,
    whole: bool = False,
    token_flops: float = 0.0,
) -> ContextPlan:
    """The fastest split `ulysses x all_gather = ranks` for documents of `lengths` tokens in bf16.

    prefixes: for trees, the document that each one continues, or -1, as in `Layout.build`.
    memory_gib: GiB that one attention layer may need; default: no limit.
    whole: also consider to leave all documents whole (`Layout.build`), where no rank gets more than `WHOLE_ROWS` times an equal share.
    token_flops: of the linear layers of one decoder layer, forward, for one token; what unequal shares cost.

    Raises ValueError for lengths, ranks or a head_dim that are not integers of at least 1, for prefixes that are not trees, and, with the
    reason of each split, when none can be used.
    """
    lengths = integers("plan_context: lengths", lengths)
    ranks, head_dim = integers("plan_context: ranks and head_dim", [ranks, head_dim])
    if head_dim < 1:
        raise ValueError(f"plan_context: head_dim is {head_dim}; expected at least 1")
    if not lengths or min(lengths) < 1 or ranks < 1:
        raise ValueError(
            f"plan_context: needs documents of at least one token and at least one rank, got {len(lengths)} documents, {ranks} ranks"
        )
    continued = check_prefixes(prefixes, len(lengths))
    hardware = hardware or Hardware()
    candidates: list[Candidate] = []
    for ulysses in range(1, ranks + 1):
        if ranks % ulysses == 0:
            candidate = _estimate(lengths, continued, ulysses, ranks // ulysses, num_heads, num_kv_heads, head_dim, hardware)
            if memory_gib is not None and not candidate.reason and candidate.peak_mib > memory_gib * 1024:
                candidate = candidate._replace(reason=f"needs {candidate.peak_mib / 1024:.1f} GiB, {memory_gib} GiB allowed")
            candidates.append(candidate)
    if whole and ranks > 1:
        candidates.append(_uncut(lengths, continued, ranks, num_heads, num_kv_heads, head_dim, token_flops, hardware))
    candidates.sort(key=lambda c: (bool(c.reason), c.total_ms, c.ulysses, not c.whole))
    best = candidates[0]
    if best.reason:
        raise ValueError(
            "plan_context: no split works. " + "; ".join(f"ulysses {c.ulysses} x all_gather {c.all_gather}: {c.reason}" for c in candidates)
        )
    return ContextPlan(best.ulysses, best.all_gather, tuple(candidates), sum(lengths), len(lengths), best.whole)


def _uncut(
    lengths: Sequence[int], prefixes: Sequence[int], r: int, num_heads: int, num_kv_heads: int, dim: int, token_flops: float, hw: Hardware
) -> Candidate:
    """The candidate that cuts no document."""
    parts = partition(lengths, r, prefixes=prefixes, whole=True)
    rows, share = max(parts.rank_tokens(lengths)), -(-sum(lengths) // r)
    flops = 4e-9 * max(_weighted_pairs(parts, lengths, prefixes, i, hw.half_length) for i in range(r)) * num_heads * dim
    compute = flops / hw.forward_tflops + 2.5 * flops / hw.backward_tflops
    waiting = 3e-9 * (rows - share) * token_flops / hw.linear_tflops
    peak = rows * dim * 2 * (4 * num_heads + 4 * num_kv_heads) + rows * dim * (4 * num_heads + 8 * num_kv_heads)
    reason = f"{rows} tokens on one rank, an equal share is {share}" if rows > WHOLE_ROWS * share else ""
    return Candidate(1, r, compute, hw.launch_ms, 0.0, 0.0, peak / 2**20, parts.imbalance, reason, True, waiting)


def _estimate(
    lengths: Sequence[int], prefixes: Sequence[int], u: int, r: int, num_heads: int, num_kv_heads: int, dim: int, hw: Hardware
) -> Candidate:
    try:
        shares = split_heads(num_heads, num_kv_heads, u)
    except ValueError as error:
        return Candidate(u, r, float("inf"), 0.0, 0.0, 0.0, 0.0, 0.0, str(error))
    parts = partition(lengths, r, prefixes=prefixes)
    heads, kv_heads = max(s.num_q for s in shares), max(s.num_kv for s in shares)
    rows = -(-sum(lengths) // (u * r)) * u  # of an all-gather rank
    local = rows // u
    piece_rows = max(documents.piece_tokens for documents in parts.ranks)
    keys = max(_selected_keys(documents, lengths, prefixes) for documents in parts.ranks)
    headwise = piece_rows >= HEADWISE_ROWS  # one key/value head at a time (all_gather.py), which costs 1 %
    weighted = max(_weighted_pairs(parts, lengths, prefixes, i, hw.half_length) for i in range(r))
    flops = 4e-9 * weighted * heads * dim  # GFLOP of the forward, more for short documents
    compute = (flops / hw.forward_tflops + 2.5 * flops / hw.backward_tflops) * (1.01 if headwise else 1.0)
    # Ulysses: q, k, v and out in both directions, forward and backward; bf16, float32 for key/value gradients that several ranks have.
    sent_kv = sum(s.num_kv for s in shares)
    repeats = sent_kv > num_kv_heads
    ulysses_bytes = 0.0
    if u > 1:
        ulysses_bytes = local * dim * 2 * (4 * num_heads + (2 + (4 if repeats else 2)) * sent_kv) * (u - 1) / u
    ulysses_gb_s = hw.host_gb_s if u <= hw.gpus_per_host and hw.gpus_per_host % u == 0 else hw.network_gb_s
    ulysses_ms = ulysses_bytes / ulysses_gb_s / 1e6 + 4 * ulysses_bytes / hw.copy_gb_s / 1e6
    # All-gather: k and v in bf16 in the forward and in the backward, their gradients in float32 in the backward.
    all_gather_bytes = (r - 1) * piece_rows * 2 * kv_heads * dim * (2 + 2 + 4)
    all_gather_gb_s = hw.host_gb_s if u * r <= hw.gpus_per_host else hw.network_gb_s
    transfer = all_gather_bytes / all_gather_gb_s / 1e6
    if transfer > OVERLAP * compute:  # overlapped (all_gather.py), except for the first chunk and what takes longer than the compute
        transfer = transfer / kv_heads + max(0.0, transfer - compute)
    handling = 3 * keys * kv_heads * dim * 8 / hw.copy_gb_s / 1e6 if r > 1 else 0.0  # selecting keys, summing their gradients
    q, kv = local * num_heads * dim * 2, local * num_kv_heads * dim * 2
    peak = 4 * q + 4 * kv  # q, out and their gradients; k, v and theirs
    if u > 1:
        peak += rows * dim * 2 * (4 * heads + 4 * kv_heads)
    # Either whole documents are computed or pieces of cut ones: float32 sums of dQ (of pieces for half of the rows at a time), dK and dV;
    # and for pieces the selected keys, and their gradients once more in the order of the ranks.
    of_whole = (rows - piece_rows) * dim * (4 * heads + 8 * kv_heads)
    q_heads, k_heads = (heads / kv_heads, 1) if headwise else (heads, kv_heads)
    of_pieces = dim * (2 * piece_rows * q_heads + 14 * keys * k_heads)
    peak += max(of_whole, of_pieces)
    return Candidate(
        u,
        r,
        compute,
        ulysses_ms + transfer + handling + hw.launch_ms,
        ulysses_bytes / 1e6,
        all_gather_bytes / 1e6,
        peak / 2**20,
        parts.imbalance,
        "",
    )


def _selected_keys(documents: RankDocuments, lengths: Sequence[int], prefixes: Sequence[int]) -> int:
    """Keys that the pieces of one rank select: of each document those of its last piece, and the whole prefix of a branch."""
    selected = {p.document: p.stop for p in documents.pieces}
    if prefixes:
        selected |= {prefixes[d]: lengths[prefixes[d]] for d in list(selected) if prefixes[d] >= 0}
    return sum(selected.values())


def _weighted_pairs(parts: Partition, lengths: Sequence[int], prefixes: Sequence[int], rank: int, half_length: float) -> float:
    """Pairs of one rank, each counted `1 + half_length / n` times for a segment of `n` keys."""
    total = 0.0
    queries: list[tuple[int, int]] = []  # document, queries
    for p in parts.ranks[rank].pieces:
        total += (p.stop * (p.stop + 1) - p.start * (p.start + 1)) / 2 * (1 + half_length / p.stop)
        queries.append((p.document, p.stop - p.start))
    for d in parts.ranks[rank].whole:
        total += lengths[d] * (lengths[d] + 1) / 2 * (1 + half_length / lengths[d])
        queries.append((d, lengths[d]))
    if prefixes:
        total += sum(n * (lengths[prefixes[d]] + half_length) for d, n in queries if prefixes[d] >= 0)
    return total


def explain(plan: ContextPlan) -> str:
    """A table of all candidates, the fastest first."""
    lines = [
        f"{plan.documents} documents, {plan.tokens} tokens: ulysses {plan.ulysses} x all_gather {plan.all_gather}"
        + (", no document cut" if plan.whole else ""),
        "ulysses all_gather  compute  exposed    total  ulysses all_gather     peak  imbalance",
        "                         ms       ms       ms       MB         MB      MiB",
    ]
    for c in plan.candidates:
        split = "  whole" if c.whole else f"{c.ulysses:7}"
        if c.reason:
            lines.append(f"{split} {c.all_gather:10}  {c.reason}")
            continue
        lines.append(
            f"{split} {c.all_gather:10} {c.compute_ms:8.2f} {c.exposed_ms:8.2f} {c.total_ms:8.2f} {c.ulysses_mb:8.1f}"
            f" {c.all_gather_mb:10.1f} {c.peak_mib:8.0f} {c.imbalance:10.1%}"
        )
    return "\n".join(lines)
