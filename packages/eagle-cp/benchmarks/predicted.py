"""What `plan_context` predicts, next to what was measured, and whether its choice is the fastest split.

Two figures decide: every predicted time is within 15 % of the measured one, and the split that it chooses is the fastest, or takes at most
3 % longer. The planner's default rates are those of flash-attn-4, so only splits with this kernel count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.results import Metric, Result
from eagle_cp import plan_context
from eagle_cp.planner import Candidate

WITHIN = 0.15
SLOWER = 0.03
METRICS = {
    "planned_ms": Metric("ms", "none"),
    "plan_error": Metric("measured / planned - 1", "none"),
    "planned_gib": Metric("GiB", "none"),
    "choice_over_best": Metric("", "lower"),
    "largest_error": Metric("", "lower"),
}
SPLIT = re.compile(r"ours (u=\d+ r=\d+|whole r=\d+), flash-attn-4")
CHOICE = "plan_context"


def candidates(lengths: Sequence[int], ranks: int, heads: int, kv_heads: int, dim: int) -> dict[str, Candidate]:
    """The planner's estimate of every split that can be used, by the name of its contender without the kernel."""
    plan = plan_context(lengths, ranks, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, whole=True)
    return {name(c): c for c in plan.candidates if not c.reason}


def name(c: Candidate) -> str:
    return f"ours whole r={c.all_gather}" if c.whole else f"ours u={c.ulysses} r={c.all_gather}"


def planned(candidate: Candidate, both_ms: float) -> dict[str, float]:
    """Metrics of the estimate next to a measured time."""
    total = candidate.total_ms
    return {"planned_ms": total, "plan_error": both_ms / total - 1, "planned_gib": candidate.peak_mib / 1024}


def judge(result: Result, packs: Sequence[str]) -> list[str]:
    """Append a case per pack with the chosen split's time over the fastest one's; what misses one of the two figures.

    Only packs of which at least two splits were measured.
    """
    missed = []
    for pack in packs:
        cases = [c for c in result.cases if c.case == pack and SPLIT.fullmatch(c.contender) and "planned_ms" in c.metrics]
        if len(cases) < 2:
            continue
        chosen = min(cases, key=lambda c: c.metrics["planned_ms"])
        best = min(cases, key=lambda c: c.metrics["both_ms"])
        over = chosen.metrics["both_ms"] / best.metrics["both_ms"]
        worst = max(cases, key=lambda c: abs(c.metrics["plan_error"]))
        details = {"chosen": chosen.contender, "fastest": best.contender, "worst": worst.contender}
        result.add(pack, CHOICE, details=details, choice_over_best=over, largest_error=worst.metrics["plan_error"])
        if over > 1 + SLOWER:
            missed.append(f"{pack}: {chosen.contender} was chosen and takes {over - 1:.1%} longer than {best.contender}")
        for case in cases:
            if abs(case.metrics["plan_error"]) > WITHIN:
                missed.append(f"{pack}: {case.contender} takes {case.metrics['plan_error']:+.1%} of the predicted time")
    return missed
