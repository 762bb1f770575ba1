"""Rows per second of `plan_many` on one core, over a mix like that of a training set; prints a table and writes it under results/.

    python packages/eagle-sampling/benchmarks/budget.py [--rows 1000000] [--no-write]

The mix: 60 % single images, 15 % of 2-8 images, 20 % one video (8 s to 1 h, log-uniform), 3 % of 2-4 videos, 2 % text only.
Costs: 256 tokens per tile, 1 to 12 tiles per image, 270 to 274 tokens per frame.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from eagle_sampling.budget import CAPS, STATUS, STRATEGIES, PlanColumns, plan, plan_many

K = 256
KINDS = (0.60, 0.15, 0.20, 0.03, 0.02)


def mixed_columns(rows: int, seed: int = 0) -> PlanColumns:
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(KINDS), rows, p=KINDS)
    images = np.select([kind == 0, kind == 1], [1, rng.integers(2, 9, rows)], 0)
    videos = np.select([kind == 2, kind == 3], [1, rng.integers(2, 5, rows)], 0)
    m, v = int(images.sum()), int(videos.sum())
    most = rng.integers(1, 13, m)  # tiles at the highest cap; a lower cap gives at most that many
    tiles = np.minimum(most[:, None], np.array(CAPS)[None, :])
    wanted = np.maximum(1, (2 * np.exp(rng.uniform(np.log(8), np.log(3600), v))).astype(np.int64))
    return PlanColumns(
        text_tokens=np.exp(rng.normal(5.5, 1.0, rows)).astype(np.int64) + 20,
        image_offsets=np.concatenate([[0], np.cumsum(images)]),
        image_tokens=K * (tiles + (tiles > 1)) + 6,
        video_offsets=np.concatenate([[0], np.cumsum(videos)]),
        wanted=wanted,
        minimum=np.minimum(8, wanted),
        frame_tokens=rng.integers(270, 275, v),
    )


def measure(columns: PlanColumns, strategy: str, max_tokens: int, repeats: int = 5) -> dict:
    times = []
    result = plan_many(columns, max_tokens=max_tokens, strategy=strategy)
    for _ in range(repeats):
        start = time.perf_counter()
        result = plan_many(columns, max_tokens=max_tokens, strategy=strategy)
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times))
    kept = result.status == 0
    frames, wanted = (column[np.repeat(kept, np.diff(columns.video_offsets))] for column in (result.frames, columns.wanted))
    return {
        "strategy": strategy,
        "max_tokens": max_tokens,
        "rows_per_second": round(len(columns) / seconds),
        "kept": round(float(kept.mean()), 4),
        "fewer_frames": round(float((frames < wanted).sum()) / max(len(frames), 1), 4),
        "dropped": {name: int((result.status == code).sum()) for code, name in enumerate(STATUS) if code and (result.status == code).any()},
    }


def measure_scalar(columns: PlanColumns, strategy: str, max_tokens: int, rows: int = 5000) -> float:
    """Microseconds per row of `plan`, without the time to make its inputs."""
    inputs = []
    for i in range(rows):
        images = columns.image_tokens[columns.image_offsets[i] : columns.image_offsets[i + 1]]
        at = range(columns.video_offsets[i], columns.video_offsets[i + 1])
        videos = [(int(columns.wanted[j]), int(columns.minimum[j]), int(columns.frame_tokens[j])) for j in at]
        inputs.append((int(columns.text_tokens[i]), images, videos))
    start = time.perf_counter()
    for text, images, videos in inputs:
        plan(text, images, videos, max_tokens=max_tokens, strategy=strategy)
    return (time.perf_counter() - start) / rows * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    columns = mixed_columns(options.rows)
    figures = [measure(columns, strategy, length) for strategy in STRATEGIES for length in (4096, 32768, 131072)]
    scalar = {strategy: round(measure_scalar(columns, strategy, 32768), 1) for strategy in STRATEGIES}

    lines = ["| strategy | L_max | million rows/s | kept | videos with fewer frames |", "|---|---|---|---|---|"]
    for f in figures:
        rate = f["rows_per_second"] / 1e6
        lines.append(f"| {f['strategy']} | {f['max_tokens']} | {rate:.2f} | {100 * f['kept']:.1f} % | {100 * f['fewer_frames']:.1f} % |")
    lines.append("")
    lines.append("`plan`, one row at L_max 32768: " + ", ".join(f"{name} {micros} us" for name, micros in scalar.items()))
    where = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows": options.rows,
        "images": len(columns.image_tokens),
        "videos": len(columns.wanted),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, one core",
        "load": round(os.getloadavg()[0], 1),
    }
    table = "\n".join(lines)
    print(table)
    if not options.no_write:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / "budget.json").write_text(json.dumps({**where, "figures": figures, "scalar_microseconds": scalar}, indent=1) + "\n")
        head = ", ".join(f"{name} {value}" for name, value in where.items())
        (folder / "budget.md").write_text(f"# plan_many on mixed rows\n\n{head}\n\n{table}\n")


if __name__ == "__main__":
    main()
