"""A result as Markdown."""

from benchmarks.results import Result


def document(result: Result) -> str:
    """Title, environment, ceilings, settings, one row per case and contender, and what was absent."""
    lines = [f"# {result.benchmark}", "", str(result.environment)]
    if result.ceilings:
        lines.append("Ceilings of this run: " + ", ".join(f"{name} {number(value)}" for name, value in result.ceilings.items()) + ".")
    if result.settings:
        lines.append("Settings: " + ", ".join(f"{name} {value}" for name, value in result.settings.items()) + ".")
    return "\n".join([*lines, "", table(result), *_absent(result)]) + "\n"


def table(result: Result) -> str:
    """One row per case and contender, one column per metric that occurs."""
    names = [name for name in result.metrics if any(name in case.metrics for case in result.cases)]
    head = ["case", "contender", *(label(result, name) for name in names)]
    rows = [[case.case, case.contender, *(number(case.metrics.get(name)) for name in names)] for case in result.cases]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def label(result: Result, metric: str) -> str:
    """Name and unit of a metric, once if they are equal."""
    unit = result.metrics[metric].unit
    return metric if unit in ("", metric) else f"{metric}, {unit}"


def number(value: float | None) -> str:
    """Four significant digits, thousands separated; empty for None."""
    if value is None:
        return ""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3e}"


def _absent(result: Result) -> list[str]:
    if not result.absent:
        return []
    return ["", "Absent:", "", *(f"- {absent.case}, {absent.contender}: {absent.reason}" for absent in result.absent)]
