"""Tables and plots of a result."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, int | None]
"""Experiment, arm, source, frames."""


def grouped(content: dict[str, Any]) -> dict[Key, list[dict[str, Any]]]:
    """The points of all seeds by experiment, arm, source and frames."""
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(content["runs"], key=lambda run: run["seed"]):
        for point in run.get("points", ()):
            groups[run["experiment"], run["arm"], point["source"], point["frames"]].append(point)
    return dict(sorted(groups.items(), key=lambda item: tuple(map(str, item[0][:3])) + (item[0][3] or 0,)))


def join(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """One result: every run once, from the first content in which it ended; `repeated` has it from the others. Runs name their machine.

    A content may itself be joined. What else it holds is kept.
    """
    runs: dict[tuple[str, str, int], dict[str, Any]] = {}
    settings, repeated, others = [], [], dict[str, Any]()
    for content in contents:
        joined = isinstance(content["settings"], list)
        settings += content["settings"] if joined else [content["settings"]]
        named = {} if joined else {"machine": f"{content['settings']['machine']}, {content['settings']['parallel']} at a time"}
        repeated += content.get("repeated", [])
        others |= {key: value for key, value in content.items() if key not in ("settings", "runs", "repeated", "seconds")}
        for run in content["runs"]:
            key, run = (run["experiment"], run["arm"], run["seed"]), named | run
            if key not in runs or "failed" in runs[key]:
                runs[key] = run
            elif "failed" not in run:
                repeated.append(run)
    return {"settings": settings, "runs": list(runs.values()), "repeated": repeated} | others


def mean(values: list[float]) -> float:
    """Of the seeds."""
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    """Standard deviation over the seeds, of a sample; NaN for one."""
    if len(values) < 2:
        return math.nan
    return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def table(content: dict[str, Any]) -> str:
    """Markdown: accuracy of every arm and source, the mean of its seeds and each of them, next to the text-only baseline; and the runs."""
    lines = ["| experiment | arm | source | frames | accuracy | deviation | seeds | text-only |", "|---|---|---|---|---|---|---|---|"]
    for (experiment, arm, source, frames), points in grouped(content).items():
        values = [point["accuracy"] for point in points]
        seeds, base = " ".join(f"{value:.2f}" for value in values), mean([point["text_only"] for point in points])
        lines.append(
            f"| {experiment} | {arm} | {source} | {frames or ''} | {mean(values):.3f} | {deviation(values):.3f} | {seeds} | {base:.3f} |"
        )
    lines += [
        "",
        "| experiment | arm | seed | parameters | steps | tokens | samples | loss | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(content["runs"], key=lambda run: (run["experiment"], run["arm"], run["seed"])):
        name = f"| {run['experiment']} | {run['arm']} | {run['seed']} |"
        if "failed" in run:
            lines.append(f"{name} failed: {run['failed'].strip().splitlines()[-1][:120]} | | | | | |")
        else:
            took = " + ".join(f"{value:.0f}" for value in run["seconds"].values())
            lines.append(f"{name} {run['parameters']} | {run['steps']} | {run['tokens']} | {run['samples']} | {run['loss']:.3f} | {took} |")
    if content.get("repeated"):
        lines += [
            "",
            "The same run on another machine:",
            "",
            "| experiment | arm | seed | machine | loss | accuracy |",
            "|---|---|---|---|---|---|",
        ]
        found = {(run["experiment"], run["arm"], run["seed"]): run for run in content["runs"]}
        for again in content["repeated"]:
            for run in (found[again["experiment"], again["arm"], again["seed"]], again):
                scores = ", ".join(f"{point['source']} {point['accuracy']:.2f}" for point in run["points"])
                lines.append(f"| {run['experiment']} | {run['arm']} | {run['seed']} | {run['machine']} | {run['loss']:.3f} | {scores} |")
    return "\n".join(lines) + "\n"


def plot(path: Path) -> None:
    """Write the table (`NAME.md`) and plots (`NAME-frames.png`, `NAME-arms.png`) next to a result."""
    import matplotlib

    matplotlib.use("Agg")
    content = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(table(content), encoding="utf-8")
    _frames(content, path.with_name(path.stem + "-frames.png"))
    _arms(content, path.with_name(path.stem + "-arms.png"))


TITLES = {
    "still_512": "one card in 512 frames",
    "order_256": "the order of three cards in 256 frames",
    "order_512": "the order of three cards in 512 frames",
}


def _frames(content: dict[str, Any], path: Path) -> None:
    """Accuracy over frames on held-out videos of 512 frames: mean of the seeds, all seeds, text-only baseline."""
    import matplotlib.pyplot as plt

    groups = grouped(content)
    figure, axes = plt.subplots(1, len(TITLES), figsize=(12, 3.8), sharey=True)
    for axis, (source, title) in zip(axes, TITLES.items()):
        arms = sorted({arm for experiment, arm, name, _ in groups if experiment == "video" and name == source})
        ticks: list[int] = []
        for number, arm in enumerate(arms):
            series = {key[3]: points for key, points in groups.items() if key[:3] == ("video", arm, source) and key[3]}
            ticks = sorted(series)
            means = [mean([point["accuracy"] for point in series[count]]) for count in ticks]
            axis.plot(ticks, means, "o-", color=f"C{number}", label=arm.replace("_", " "))
            for count in ticks:
                axis.plot([count] * len(series[count]), [point["accuracy"] for point in series[count]], ".", color=f"C{number}", alpha=0.4)
            if number == 0:
                base = [mean([point["text_only"] for point in series[count]]) for count in ticks]
                axis.plot(ticks, base, "k--", label="text-only baseline")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(count) for count in ticks])
        axis.set_title(title)
        axis.set_xlabel("most frames that are read")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(-0.02, 1.02)
    if axes[0].lines:
        axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _arms(content: dict[str, Any], path: Path) -> None:
    """Accuracy of the arms of the other experiments by source, with all seeds."""
    import matplotlib.pyplot as plt

    groups = grouped(content)
    names = [name for name in ("text", "tiling", "fill", "weighting") if any(key[0] == name for key in groups)]
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(3.4 * max(1, len(names)), 3.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        mine = {key: points for key, points in groups.items() if key[0] == name}
        arms, sources = sorted({key[1] for key in mine}), sorted({key[2] for key in mine})
        width = 0.8 / len(arms)
        for number, arm in enumerate(arms):
            for place, source in enumerate(sources):
                values = [point["accuracy"] for point in mine.get((name, arm, source, None), ())]
                if not values:
                    continue
                at = place + (number - (len(arms) - 1) / 2) * width
                axis.bar(at, mean(values), 0.9 * width, color=f"C{number}", alpha=0.7, label=arm if place == 0 else None)
                axis.plot([at] * len(values), values, "k.", markersize=3)
        labels = [source.replace("letters_", "").replace("_test", "").replace("_", "\n") for source in sources]
        axis.set_xticks(range(len(sources)), labels, fontsize=8)
        axis.set_title(name)
        axis.set_ylim(0, 1.25)
        axis.legend(fontsize=8, loc="upper center", ncols=len(arms))
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel("accuracy")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
