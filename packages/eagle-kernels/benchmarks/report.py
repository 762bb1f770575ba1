"""Results as a Markdown table and as a plot."""

from pathlib import Path
from typing import Any


def markdown(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"{result['gpu']}, {result['date']}; {versions}.",
        f"Ceilings of this run: copy {result['copy_tb_per_s']:.2f} TB/s, bf16 matmul 8192^3 {result['matmul_tflops']:.0f} TFLOP/s"
        " (the head's own rate is measured among its runs).",
        "",
        "| operator | contender | ms | of roof | extra memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        memory = f"{row['peak_extra_gib']:.2f}" if "peak_extra_gib" in row else ""
        if row["contender"] == "ours" and memory:
            memory += f" ({row['peak_extra_beyond_fp32_weight_gradient_gib']:.2f} beyond the fp32 weight gradient)"
        lines.append(f"| {row['operator']} | {row['contender']} | {row['ms']:.3f} | {row['of_roof']:.2f} | {memory} |")
    if result["failures"]:
        lines += ["", "Not run:"] + [f"- {line.strip().splitlines()[-1]}" for line in result["failures"]]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the fraction of the roof, one group an operator; left out where matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    operators = list(dict.fromkeys(row["operator"] for row in result["rows"]))
    contenders = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    figure, axes = pyplot.subplots(figsize=(10, 0.55 * len(operators) + 1.5))
    height = 0.8 / max(1, len(contenders))
    for index, contender in enumerate(contenders):
        points = [(operators.index(row["operator"]), row["of_roof"]) for row in result["rows"] if row["contender"] == contender]
        axes.barh([y + index * height for y, _ in points], [value for _, value in points], height, label=contender)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(operators))], operators, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.5)
    axes.set_xlabel(f"fraction of this run's measured copy bandwidth or matmul rate ({result['gpu']}, {result['date']})", fontsize=8)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
