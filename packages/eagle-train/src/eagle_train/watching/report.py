"""A run in one picture and a few lines: loss, accuracy next to the text-only baseline, and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eagle_train.errors import counted
from eagle_train.training.metrics import Metrics, duration


def write_report(folder: str | Path) -> Path:
    """Draw plot.png from metrics.jsonl of a run folder; returns its path. Raises ValueError when there are no steps yet."""
    folder = Path(folder)
    records = list(Metrics(folder / "metrics.jsonl"))
    path = folder / "plot.png"
    _draw(records, path)
    return path


def summary(folder: str | Path) -> str:
    """The run so far, a line per stage and the last scores."""
    records = list(Metrics(Path(folder) / "metrics.jsonl"))
    steps = _steps(records)
    lines, missed, shown = [], 0, 0
    for name in dict.fromkeys(record["stage"] for record in steps):
        own = [record for record in steps if record["stage"] == name]
        last = own[-1]
        speed = float(np.median([record["tokens_per_second"] for record in own]))
        # A running sum: steps between two lines of metrics count as well.
        total = last.get("seen_missing", missed + sum(record["missing"] for record in own))  # runs from before it was written
        missing, missed = total - missed, total
        lines.append(
            f"stage {name}: step {last['step']} of {last['steps']}, loss {own[0]['loss']:.3f} -> {last['loss']:.3f}, "
            f"{speed:,.0f} tok/s, {_mfu(own)}{counted(missing, 'sample')} missing"
        )
        if concealed := last.get("seen_concealed", 0) - shown:
            lines[-1] += f", {counted(concealed, 'damaged frame')} concealed"
            shown += concealed
        for source in _sources(own):
            losses = [record["losses"][source] for record in own if source in record.get("losses", {})]
            lines.append(f"  {source}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for record in [record for record in records if record["kind"] in ("eval", "final")][-1:]:
        for source, score in record["scores"].items():
            lines.append(
                f"{source}: {score['accuracy']:.3f} right of {score['questions']} questions at step {record['total_step']}, "
                f"{score['text_only']:.3f} text-only"
            )
    logged = sum(record["seconds"] for record in steps)
    lines.append(f"{steps[-1]['seen_tokens']:,} tokens; {duration(logged)} in logged steps")
    return "\n".join(lines)


def _mfu(steps: list[dict[str, Any]]) -> str:
    """The median MFU of steps, where it was measured."""
    measured = [record["mfu"] for record in steps if record.get("mfu") is not None]
    return f"MFU {float(np.median(measured)):.1%}, " if measured else ""


def _steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = [record for record in records if record["kind"] == "step"]
    if not steps:
        raise ValueError("metrics.jsonl has no steps yet; eagle train writes them")
    return steps


def _sources(steps: list[dict[str, Any]]) -> list[str]:
    """Names of sources with a loss of their own, in the order in which they appear."""
    return list(dict.fromkeys(source for record in steps for source in record.get("losses", {})))


def _draw(records: list[dict[str, Any]], path: Path) -> None:
    # The plain canvas: no display, no global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = _steps(records)
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, score_axes = figure.subplots(2, 1, sharex=True)
    at = np.array([record["total_step"] for record in steps])
    loss = np.array([float(record["loss"]) for record in steps])
    loss_axes.plot(at, loss, color="0.8", linewidth=0.8)
    loss_axes.plot(at, _smooth(loss), color="tab:blue", label="all sources")
    for index, source in enumerate(_sources(steps)):
        own = [record for record in steps if source in record.get("losses", {})]
        values = np.array([record["losses"][source] for record in own])
        loss_axes.plot([record["total_step"] for record in own], _smooth(values), color=f"C{index + 1}", linewidth=0.8, label=source)
    if _sources(steps):
        loss_axes.legend(loc="upper right", fontsize=8)
    loss_axes.set_ylabel("loss")
    if (loss > 0).all():
        loss_axes.set_yscale("log")
    rate = loss_axes.twinx()
    rate.plot(at, [record["lr"] for record in steps], color="tab:orange", linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    scored = [record for record in records if record["kind"] in ("eval", "final")]
    for index, source in enumerate(dict.fromkeys(name for record in scored for name in record["scores"])):
        own = [record for record in scored if source in record["scores"]]
        colour = f"C{index + 2}"
        score_axes.plot([r["total_step"] for r in own], [r["scores"][source]["accuracy"] for r in own], "o-", color=colour, label=source)
        score_axes.axhline(
            own[-1]["scores"][source]["text_only"], color=colour, linestyle="--", linewidth=0.8, label=f"{source}, text-only"
        )
    score_axes.set_ylim(0, 1)
    score_axes.set_ylabel("share of right answers")
    score_axes.set_xlabel("optimizer step")
    if scored:
        score_axes.legend(loc="lower right", fontsize=8)
    for axes in (loss_axes, score_axes):
        for name in dict.fromkeys(record["stage"] for record in steps):
            first = next(record["total_step"] for record in steps if record["stage"] == name)
            axes.axvline(first, color="0.6", linewidth=0.6)
            if axes is loss_axes:
                axes.text(first, 1.01, name, transform=axes.get_xaxis_transform(), fontsize=8)
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _smooth(values: np.ndarray) -> np.ndarray:
    width = max(1, len(values) // 50)
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.convolve(padded, np.ones(width) / width, mode="valid")
