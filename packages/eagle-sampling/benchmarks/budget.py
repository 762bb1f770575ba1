"""Rows per second of `plan_many` on one core, over a mix like that of a training set.

    python packages/eagle-sampling/benchmarks/budget.py [--rows 1000000] [--out FILE.json]

The mix: 60 % single images, 15 % of 2-8 images, 20 % one video (8 s to 1 h, log-uniform), 3 % of 2-4 videos, 2 % text only.
Costs: 256 tokens per tile, 1 to 12 tiles per image, 270 to 274 tokens per frame.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.timing import interleaved_seconds, medians
from eagle_sampling.budget import CAPS, STATUS, STRATEGIES, PlanColumns, plan, plan_many

METRICS = {
    "million_rows_per_s": Metric("", "higher"),
    "us_per_row": Metric("us", "lower"),
    "kept": Metric("share of rows", "none"),
    "fewer_frames": Metric("share of videos", "none"),
}
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


def measure(result: Result, columns: PlanColumns, strategy: str, max_tokens: int, rounds: int = 5) -> None:
    run = {"ours": lambda: plan_many(columns, max_tokens=max_tokens, strategy=strategy)}
    seconds = medians(interleaved_seconds(run, rounds))["ours"]
    plans = run["ours"]()
    kept = plans.status == 0
    frames, wanted = (column[np.repeat(kept, np.diff(columns.video_offsets))] for column in (plans.frames, columns.wanted))
    dropped = {name: int((plans.status == code).sum()) for code, name in enumerate(STATUS) if code and (plans.status == code).any()}
    result.add(
        f"plan_many, {strategy}, L_max {max_tokens}",
        details={"dropped": dropped},
        million_rows_per_s=len(columns) / seconds / 1e6,
        kept=kept.mean(),
        fewer_frames=(frames < wanted).sum() / max(len(frames), 1),
    )


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    add_out(parser)
    options = parser.parse_args()
    columns = mixed_columns(options.rows)
    settings = {"rows": options.rows, "images": len(columns.image_tokens), "videos": len(columns.wanted)}
    result = Result("eagle-sampling/budget", environment(("numpy",)), METRICS, settings=settings)
    for strategy in STRATEGIES:
        for max_tokens in (4096, 32768, 131072):
            measure(result, columns, strategy, max_tokens)
    for strategy in STRATEGIES:
        result.add(f"plan, one row, {strategy}, L_max 32768", us_per_row=measure_scalar(columns, strategy, 32768, min(5000, options.rows)))
    report(result, options.out)


if __name__ == "__main__":
    main()
