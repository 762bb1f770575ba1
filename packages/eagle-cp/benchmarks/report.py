"""Writes a result of bench.py as a Markdown table and a plot.

python packages/eagle-cp/benchmarks/report.py packages/eagle-cp/benchmarks/results/DATE-MACHINE.json [--plot]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

IN_TURN = "All rows were measured one after the other in one process."


def table(result: dict) -> str:
    lines = [
        "| pack | method | forward ms | fwd+bwd ms | TFLOP/s per GPU: forward | backward | both | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "error" in row:
            if not row["error"].startswith("does not run"):
                lines.append(f"| {row['pack']} | {row['method']} | {row['error'][:80]} | | | | | |")
            continue
        name = f"**{row['method']}**" if row["method"].startswith("ours") else row["method"]
        lines.append(
            f"| {row['pack']} | {name} | {row['forward_ms']:.1f} | {row['both_ms']:.1f} | {row['forward_tflops']:.0f}"
            f" | {row['backward_tflops']:.0f} | {row['both_tflops']:.0f} | {row['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    packs = list(dict.fromkeys(r["pack"] for r in result["rows"]))
    figure, axes = plt.subplots(2, 3, figsize=(16, 9), sharex=True)
    for axis, pack in zip(axes.flat, packs):
        rows = sorted((r for r in result["rows"] if r["pack"] == pack and "error" not in r), key=lambda r: r["both_tflops"])
        colours = ["#d62728" if r["method"].startswith("ours") else "#7f7f7f" if r["method"].startswith("one") else "#1f77b4" for r in rows]
        bars = axis.barh([r["method"] for r in rows], [r["both_tflops"] for r in rows], color=colours)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_title(pack, fontsize=10)
        axis.tick_params(labelsize=7)
    figure.suptitle(
        f"TFLOP/s per GPU, forward + backward, {result['gpus']} x {result['gpu']}, {result['date']} (red: eagle-cp, grey: one GPU)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    found = json.loads(source.read_text())
    source.with_suffix(".md").write_text(
        f"# {found['gpus']} x {found['gpu']}, {found['date']}\n\n{json.dumps(found['versions'])}\n\n"
        f"Ceilings: {json.dumps(found['ceilings'])}\n\n"
        f"{found['heads'][0]} query and {found['heads'][1]} key/value heads of {found['heads'][2]}, bf16, causal."
        f" {found.get('note', IN_TURN)} Peaks are the largest of the ranks.\n\n" + table(found) + "\n"
    )
    if "--plot" in sys.argv:
        plot(found, source.with_suffix(".png"))
