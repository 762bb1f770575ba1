"""Bars of one metric of a result: python -m benchmarks.plot RESULT.json METRIC [--out FILE.png]

One group of bars per case, one bar per contender. Needs matplotlib.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import ResultError, read
from benchmarks.tables import label


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("metric", metavar="METRIC")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: RESULT.png")
    options = parser.parse_args(arguments)
    try:
        result = read(options.result)
    except ResultError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    shown = [case for case in result.cases if options.metric in case.metrics]
    if not shown:
        print(f"plot: {options.result} has no figures of {options.metric!r}; it has {', '.join(result.metrics)}", file=sys.stderr)
        return 2
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(case.case for case in shown))
    contenders = list(dict.fromkeys(case.contender for case in shown))
    height = 0.8 / len(contenders)
    figure, axes = pyplot.subplots(figsize=(10, 0.13 * len(cases) * (len(contenders) + 1) + 1.5))
    for index, contender in enumerate(contenders):
        bars = [(cases.index(case.case) + index * height, case.metrics[options.metric]) for case in shown if case.contender == contender]
        axes.barh([place for place, _ in bars], [value for _, value in bars], height, label=contender)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(cases))], cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "\n".join(textwrap.wrap(f"{label(result, options.metric)} ({result.benchmark}; {result.environment})", 150)), fontsize=7
    )
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)  # above the bars, which are long
    figure.tight_layout()
    figure.savefig(options.out or options.result.with_suffix(".png"), dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
