"""Plots of evaluations: accuracy by number of frames or context length, and a heat map of frames by depth of a needle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Accuracy of each source with its 95 % interval over log2 of the frames, or of max_tokens when only that varies; the text-only
    baseline, if there is one, is a dashed line. With both, a panel per max_tokens. rows: those of `sweep.jsonl`."""
    by_frames = any(row["frames"] is not None for row in rows)
    key, other = ("frames", "max_tokens") if by_frames else ("max_tokens", "frames")
    baseline = all(row["text_only"] is not None for row in rows)
    panels = list(dict.fromkeys(row[other] for row in rows))
    figure, axes = _figure(len(panels), 1, (1 + 4.5 * len(panels), 4))
    for axis, panel in zip(axes, panels):
        some = [row for row in rows if row[other] == panel]
        for number, source in enumerate(dict.fromkeys(row["source"] for row in some)):
            own = sorted((row for row in some if row["source"] == source), key=lambda row: row[key])
            at = np.log2([row[key] for row in own])
            mean, low, high = (np.array([row[name] for row in own]) for name in ("accuracy", "low", "high"))
            bars = np.maximum((mean - low, high - mean), 0)
            axis.errorbar(at, mean, bars, fmt="o-", color=f"C{number}", capsize=3, label=source)
            if baseline:
                axis.plot(at, [row["text_only"] for row in own], "--", color=f"C{number}", linewidth=0.8)
        values = sorted({row[key] for row in some})
        axis.set_xticks(np.log2(values), [str(value) for value in values])
        axis.set_xlabel("most frames of a video" if by_frames else "context length in tokens")
        axis.set_title("" if panel is None else f"{other} = {panel}")
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("accuracy (dashed: text-only)" if baseline else "accuracy")
    axes[0].legend(fontsize=8)
    return _save(figure, path)


def plot_depths(answers: Iterable[Mapping[str, Any]], needles: Mapping[int, Mapping[str, Any]], path: Path) -> Path:
    """Share of right rows by number of frames and depth of the needle, a panel per kind of needle.

    answers: lines of `answers.jsonl` of a sweep over frames. needles: lines of `needles.jsonl` by `line`. Raises ValueError when no row
    is in both.
    """
    cells: dict[str, dict[tuple[int, float], list[float]]] = {}
    for answer in answers:
        needle = needles.get(answer["line"])
        if needle is not None and answer.get("frames") is not None:
            cells.setdefault(needle["kind"], {}).setdefault((answer["frames"], needle["depth"]), []).append(answer["score"])
    if not cells:
        raise ValueError("no answer of a sweep over frames is about a needle; run eagle eval --frames on the folder that eagle needle made")
    figure, axes = _figure(len(cells), 1, (1 + 3.5 * len(cells), 4))
    for axis, (kind, of_kind) in zip(axes, cells.items()):
        frames, depths = (sorted({cell[index] for cell in of_kind}) for index in (0, 1))
        grid = np.array([[np.mean(of_kind.get((count, depth), [np.nan])) for count in frames] for depth in depths])  # pyright: ignore[reportArgumentType, reportCallIssue]
        image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set_xticks(range(len(frames)), [str(count) for count in frames])
        axis.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        axis.set_xlabel("most frames of a video")
        axis.set_title(kind)
    axes[0].set_ylabel("depth (0: start, 1: end)")
    figure.colorbar(image, ax=axes, label="share of right rows")  # pyright: ignore[reportPossiblyUnboundVariable]
    return _save(figure, path)


def _figure(columns: int, rows: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    # The plain canvas: no display, no global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
