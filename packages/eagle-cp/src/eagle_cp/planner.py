"""Which split of a context group is fastest for a pack, by arithmetic: kernel time, bytes over the links, peak memory, before any GPU is
touched.

The rates are defaults measured on H200 with flash-attn-4 (README); pass your own. The model counts one attention layer, forward and
backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eagle_cp.core import FINE_ROWS
from eagle_cp.heads import split_heads
from eagle_cp.partition import Partition, partition
from eagle_cp.segments import integers


class Hardware(NamedTuple):
    """Rates of one GPU and its links. `half_length`: documents of that many tokens reach half of the kernel's rate."""

    forward_tflops: float = 647.0
    backward_tflops: float = 605.0
    half_length: float = 880.0
    copy_gb_s: float = 4000.0
    host_gb_s: float = 236.0  # what a rank sends per second to ranks of its own host
    network_gb_s: float = 45.0  # to ranks of other hosts
    gpus_per_host: int = 8
    launch_ms: float = 0.3  # of one attention layer, forward and backward, besides its kernels' own time


class Candidate(NamedTuple):
    """One split. Times in ms, `ulysses_mb` and `gather_mb` sent per rank, `peak_mb` of a rank; all for one attention layer, forward and
    backward.

    `reason` says why the split can't be used, or is empty.
    """

    ulysses: int
    gather: int
    compute_ms: float
    exposed_ms: float
    ulysses_mb: float
    gather_mb: float
    peak_mb: float
    imbalance: float
    reason: str

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.exposed_ms


class ContextPlan(NamedTuple):
    """The chosen split, and all that were weighed, fastest first."""

    ulysses: int
    gather: int
    candidates: tuple[Candidate, ...]
    tokens: int
    documents: int


def plan_context(
    lengths: Sequence[int],
    ranks: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hardware: Hardware | None = None,
    memory_gib: float | None = None,
) -> ContextPlan:
    """The fastest split `ulysses x gather = ranks` for documents of `lengths` tokens in bf16, within `memory_gib` for one attention layer
    if given.

    Raises ValueError for lengths that are no integers of 1 or more, and, with each split's reason, when none can be used.
    """
    lengths = integers("plan_context: lengths", lengths)
    if not lengths or min(lengths) < 1 or ranks < 1:
        raise ValueError(
            f"plan_context: needs documents of at least one token and at least one rank, got {len(lengths)} documents, {ranks} ranks"
        )
    hardware = hardware or Hardware()
    candidates = []
    for ulysses in range(1, ranks + 1):
        if ranks % ulysses == 0:
            candidate = _weigh(lengths, ulysses, ranks // ulysses, num_heads, num_kv_heads, head_dim, hardware)
            if memory_gib is not None and not candidate.reason and candidate.peak_mb > memory_gib * 1024:
                candidate = candidate._replace(reason=f"needs {candidate.peak_mb / 1024:.1f} GiB, {memory_gib} GiB allowed")
            candidates.append(candidate)
    candidates.sort(key=lambda c: (bool(c.reason), c.total_ms, c.ulysses))
    best = candidates[0]
    if best.reason:
        raise ValueError(
            "plan_context: no split works. " + "; ".join(f"ulysses {c.ulysses} x gather {c.gather}: {c.reason}" for c in candidates)
        )
    return ContextPlan(best.ulysses, best.gather, tuple(candidates), sum(lengths), len(lengths))


def _weigh(lengths: Sequence[int], u: int, r: int, num_heads: int, num_kv_heads: int, dim: int, hw: Hardware) -> Candidate:
    try:
        shares = split_heads(num_heads, num_kv_heads, u)
    except ValueError as error:
        return Candidate(u, r, float("inf"), 0.0, 0.0, 0.0, 0.0, 0.0, str(error))
    split = partition(lengths, r)
    heads, kv_heads = max(s.num_q for s in shares), max(s.num_kv for s in shares)
    rows = -(-sum(lengths) // (u * r)) * u  # of a gather rank
    local = rows // u
    shared_rows = max(sum(p.stop - p.start for p in share.pieces) for share in split.shares)
    keys = max(sum({p.document: p.stop for p in share.pieces}.values()) for share in split.shares)  # the last piece's are all
    fine = shared_rows >= FINE_ROWS  # one key/value head at a time (core.py), which costs 1 %
    weighted = max(_weighted_pairs(split, lengths, i, hw.half_length) for i in range(r))
    flops = 4e-9 * weighted * heads * dim  # GFLOP of the forward, slowed by short documents
    compute = (flops / hw.forward_tflops + 2.5 * flops / hw.backward_tflops) * (1.01 if fine else 1.0)
    # Ulysses: q, k, v and out there and back, forward and backward; bf16, and fp32 for key/value gradients that several ranks share.
    sent_kv = sum(s.num_kv for s in shares)
    repeats = sent_kv > num_kv_heads
    ulysses_bytes = 0.0
    if u > 1:
        ulysses_bytes = local * dim * 2 * (4 * num_heads + (2 + (4 if repeats else 2)) * sent_kv) * (u - 1) / u
    inside = hw.host_gb_s if u <= hw.gpus_per_host and hw.gpus_per_host % u == 0 else hw.network_gb_s
    ulysses_ms = ulysses_bytes / inside / 1e6 + 4 * ulysses_bytes / hw.copy_gb_s / 1e6
    # Gather: k and v in bf16 in both directions, their gradients in fp32 in the backward.
    gather_bytes = (r - 1) * shared_rows * 2 * kv_heads * dim * (2 + 2 + 4)
    outside = hw.host_gb_s if u * r <= hw.gpus_per_host else hw.network_gb_s
    travel = gather_bytes / outside / 1e6
    if travel > 0.05 * compute:  # overlapped (core.py); the first chunk and what the compute can't cover show
        travel = travel / kv_heads + max(0.0, travel - compute)
    handling = 3 * keys * kv_heads * dim * 8 / hw.copy_gb_s / 1e6 if r > 1 else 0.0  # picking keys, adding up their gradients
    q, kv = local * num_heads * dim * 2, local * num_kv_heads * dim * 2
    peak = 4 * q + 4 * kv  # q, out and their gradients; k, v and theirs
    if u > 1:
        peak += rows * dim * 2 * (4 * heads + 4 * kv_heads)
    # Either whole documents are computed or shared ones: fp32 sums of dQ (of shared pieces for half of the rows at a time), dK and dV;
    # and for shared ones the picked keys, and their gradients once more in the order of the ranks.
    of_whole = (rows - shared_rows) * dim * (4 * heads + 8 * kv_heads)
    q_heads, k_heads = (heads / kv_heads, 1) if fine else (heads, kv_heads)
    of_shared = dim * (2 * shared_rows * q_heads + 14 * keys * k_heads)
    peak += max(of_whole, of_shared)
    return Candidate(
        u,
        r,
        compute,
        ulysses_ms + travel + handling + hw.launch_ms,
        ulysses_bytes / 1e6,
        gather_bytes / 1e6,
        peak / 2**20,
        split.imbalance,
        "",
    )


def _weighted_pairs(split: Partition, lengths: Sequence[int], rank: int, half_length: float) -> float:
    """Pairs of one rank, each counted `1 + half_length / n` times for a segment of `n` keys."""
    total = 0.0
    for p in split.shares[rank].pieces:
        total += (p.stop * (p.stop + 1) - p.start * (p.start + 1)) / 2 * (1 + half_length / p.stop)
    for d in split.shares[rank].whole:
        total += lengths[d] * (lengths[d] + 1) / 2 * (1 + half_length / lengths[d])
    return total


def explain(plan: ContextPlan) -> str:
    """A table of all candidates, the chosen one first."""
    lines = [
        f"{plan.documents} documents, {plan.tokens} tokens: ulysses {plan.ulysses} x gather {plan.gather}",
        "ulysses gather  compute  exposed    total  ulysses  gather     peak  imbalance",
        "                     ms       ms       ms       MB      MB      MiB",
    ]
    for c in plan.candidates:
        if c.reason:
            lines.append(f"{c.ulysses:7} {c.gather:6}  {c.reason}")
            continue
        lines.append(
            f"{c.ulysses:7} {c.gather:6} {c.compute_ms:8.2f} {c.exposed_ms:8.2f} {c.total_ms:8.2f} {c.ulysses_mb:8.1f} {c.gather_mb:7.1f}"
            f" {c.peak_mb:8.0f} {c.imbalance:9.1%}"
        )
    return "\n".join(lines)
