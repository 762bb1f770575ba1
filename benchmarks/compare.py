"""Compare two results of one benchmark: python -m benchmarks.compare OLD.json NEW.json [--threshold 1.05]

Prints, for every case, the factor by which NEW is worse than OLD: new / old for metrics where lower is better, old / new where higher is.
Exit code: 0 if no factor of the chosen contenders is above the threshold; 1 if one is, or if a figure of OLD is missing in NEW; 2 if a file
cannot be used. Factors of other contenders are printed too: if they changed as well, the machine differs and not the code.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Result, ResultError, read
from benchmarks.tables import number


@dataclass(frozen=True)
class Change:
    """One metric of one case. factor: above 1 is worse; infinite where the quotient would divide by zero."""

    case: str
    contender: str
    metric: str
    old: float
    new: float | None
    factor: float


def changes(old: Result, new: Result, metrics: Sequence[str] = ()) -> list[Change]:
    """Every figure of `old` whose metric has a direction (or is in `metrics`), in order. Missing in `new`: None, factor NaN.

    Raises ResultError for results of different benchmarks, for metrics whose direction differs, and for names that OLD does not declare.
    """
    if old.benchmark != new.benchmark:
        raise ResultError(f"OLD is a result of {old.benchmark} and NEW of {new.benchmark}; compare results of one benchmark")
    directed = {name: metric.better for name, metric in old.metrics.items() if metric.better != "none"}
    for name in metrics:
        if name not in directed:
            raise ResultError(f"metric {name!r} cannot be compared; OLD has {', '.join(directed)}")
    for name, better in directed.items():
        if name in new.metrics and new.metrics[name].better != better:
            raise ResultError(f"metric {name!r}: better is {better} in OLD and {new.metrics[name].better} in NEW")
    found = {(case.case, case.contender): case.metrics for case in new.cases}
    rows = []
    for case in old.cases:
        for name, before in case.metrics.items():
            if name in (metrics or directed):
                after = found.get((case.case, case.contender), {}).get(name)
                rows.append(Change(case.case, case.contender, name, before, after, _factor(before, after, directed[name])))
    return rows


def _factor(old: float, new: float | None, better: str) -> float:
    if new is None:
        return math.nan
    worse, base = (new, old) if better == "lower" else (old, new)
    if worse == base:
        return 1.0
    return worse / base if base else math.inf


def failures(rows: Sequence[Change], threshold: float, contenders: Sequence[str]) -> list[Change]:
    """The changes of `contenders` that are missing in NEW or worse than `threshold`."""
    return [row for row in rows if _decides(row.contender, contenders) and (row.new is None or row.factor > threshold)]


def _decides(contender: str, chosen: Sequence[str]) -> bool:
    """Whether a contender is one of the chosen or a variant of it, such as "ours, out=" or "ours u=2 r=1" of "ours"."""
    return any(contender == name or contender.startswith((f"{name},", f"{name} ")) for name in chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--threshold", type=float, default=1.05, help="largest factor that passes (default: 1.05, 5 %% worse)")
    parser.add_argument("--contender", nargs="+", default=["ours"], help="they decide the exit code (default: ours)")
    parser.add_argument("--metric", nargs="+", default=[], help="metrics to compare (default: all with a direction)")
    options = parser.parse_args(arguments)
    if not 0.0 < options.threshold < math.inf:
        parser.error(f"--threshold is {options.threshold}, expected a positive number")
    try:
        old, new = read(options.old), read(options.new)
        rows = changes(old, new, options.metric)
    except ResultError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if not any(_decides(row.contender, options.contender) for row in rows):
        print(f"compare: OLD has no figures of {', '.join(options.contender)}; choose with --contender", file=sys.stderr)
        return 2
    failed = failures(rows, options.threshold, options.contender)
    print(f"old: {old.environment}\nnew: {new.environment}")
    for name in old.ceilings.keys() & new.ceilings.keys():
        print(f"ceiling {name}: {number(old.ceilings[name])} -> {number(new.ceilings[name])}")
    print("\n| case | contender | metric | old | new | factor (above 1 is worse) | |\n|---|---|---|---|---|---|---|")
    for row in rows:
        mark = "" if row not in failed else "missing" if row.new is None else "worse"
        factor = "" if row.new is None else f"{row.factor:.3f}"
        print(f"| {row.case} | {row.contender} | {row.metric} | {number(row.old)} | {number(row.new)} | {factor} | {mark} |")
    added = {(case.case, case.contender) for case in new.cases} - {(case.case, case.contender) for case in old.cases}
    if added:
        print("\nOnly in NEW: " + "; ".join(f"{case} ({contender})" for case, contender in sorted(added)))
    print(f"\n{len(failed)} of {len(rows)} figures missing or worse than {options.threshold} ({', '.join(options.contender)})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
