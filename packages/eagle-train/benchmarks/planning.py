"""How full and how even packs are, beside the rules of other packers, and how fast columns become plans.

    python packages/eagle-train/benchmarks/planning.py [samples]

Distributions at 16K tokens: short images (1-13 tiles of 256 tokens and a question), mixed (a tenth documents of 2-8K, a tenth
anything up to 16K), video-heavy (85 % videos of 30-60 frames, most longer than half a pack). Rivals, in arrival order within a
buffer: worst fit into the emptiest open pack (the original's rule), online best fit; and best fit decreasing over everything.
"""

import heapq
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from eagle_sampling import TimeTable
from eagle_train.config import SamplingConfig, StageConfig, TilingConfig
from eagle_train.data.facts import SCHEMA, Facts, FactsSource, FrameCosts
from eagle_train.planning.packing import _best_fit, pack, sample_costs
from eagle_train.planning.stages import plan_stage
from eagle_train.planning.visual import ModelFacts, plan_visual

CAPACITY = 16384


def short_images(rng: np.random.Generator, count: int) -> np.ndarray:
    return 256 * rng.integers(1, 14, count) + rng.integers(30, 400, count)


def mixed(rng: np.random.Generator, count: int) -> np.ndarray:
    kind = rng.random(count)
    lengths = np.where(kind < 0.2, rng.integers(2000, 8000, count), short_images(rng, count))
    return np.where(kind < 0.1, rng.integers(4000, CAPACITY, count), lengths)


def video_heavy(rng: np.random.Generator, count: int) -> np.ndarray:
    videos = 266 * rng.integers(30, 61, count) + rng.integers(50, 150, count)
    return np.where(rng.random(count) < 0.15, short_images(rng, count), videos)


def worst_fit(lengths: np.ndarray) -> np.ndarray:
    """Pack of each sample: the emptiest pack if the sample fits there, else a new one."""
    rooms: list[tuple[int, int]] = []
    bins, count = [], 0
    for length in lengths.tolist():
        if rooms and -rooms[0][0] >= length:
            room, index = heapq.heappop(rooms)
        else:
            room, index = -CAPACITY, count
            count += 1
        heapq.heappush(rooms, (room + length, index))
        bins.append(index)
    return np.array(bins)


def describe(name: str, lengths: np.ndarray, bins: np.ndarray) -> str:
    count = int(bins.max()) + 1
    costs = np.bincount(bins, weights=sample_costs(lengths))
    return f"  {name:24s} fill {lengths.sum() / (count * CAPACITY):.4f}   cost spread {costs.std() / costs.mean():.4f}"


def packing(count: int) -> None:
    rng = np.random.default_rng(0)
    for name, distribution in (("short images", short_images), ("mixed", mixed), ("video-heavy", video_heavy)):
        lengths = distribution(rng, count).astype(np.int64)
        print(f"{name}, {count} samples, mean {lengths.mean():.0f} tokens")
        print(describe("worst fit, online", lengths, worst_fit(lengths)))
        print(describe("best fit, online", lengths, _best_fit(lengths, CAPACITY)[0]))
        falling = np.sort(lengths)[::-1]
        print(describe("best fit, decreasing", falling, _best_fit(falling, CAPACITY)[0]))
        start = time.process_time()
        packs = pack(lengths, CAPACITY, seed=1)
        seconds = time.process_time() - start
        bins = np.empty(count, np.int64)
        bins[packs.items] = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
        print(describe("ours", lengths, bins) + f"   {count / seconds:,.0f} samples/s")


def facts_of(count: int) -> Facts:
    """Rows: a third text, a third single images, a sixth three images, a sixth 30-second videos; every size different."""
    rng = np.random.default_rng(0)
    base = 30_000
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    table = TimeTable.from_ticks(range(300), Fraction(1, 10)).to_list()
    for row in range(base):
        images = (0, 0, 1, 1, 3, 0)[row % 6]
        video = row % 6 == 5
        columns["line"].append(row + 1)
        columns["offset"].append(row * 200)
        columns["size"].append(199)
        columns["text_tokens"].append(int(rng.integers(50, 800)))
        columns["label_tokens"].append(40)
        columns["image_width"].append(rng.integers(100, 3000, images).tolist())
        columns["image_height"].append(rng.integers(100, 3000, images).tolist())
        values = {"frames": 300, "seconds": 30.0, "end": 29.9, "start": None, "stop": None, "width": 640, "height": 360, "times": table}
        for name, value in values.items():
            columns[f"video_{name}"].append([value] if video else [])
    small = pa.table(columns, schema=SCHEMA)
    costs = FrameCosts(tuple(tuple(14 + row + column for column in range(8)) for row in range(8)))
    whole = pa.concat_tables([small] * (count // base)).combine_chunks()
    return Facts(whole, (FactsSource("all", Path("all"), Path("."), 0, len(whole), 0, 1.0, 1.0, None),), costs, None, "key")


def columns(count: int) -> None:
    facts, model = facts_of(count), ModelFacts(448, 256)
    sampling, tiling = SamplingConfig(), TilingConfig()
    for max_tokens in (32768, 131072):
        start = time.process_time()
        visual = plan_visual(facts, max_tokens, model, sampling=sampling, tiling=tiling)
        middle = time.process_time()
        stage = StageConfig.model_validate({"name": "s", "max_tokens": max_tokens})
        plan = plan_stage(facts, stage, model, sampling=sampling, tiling=tiling, visual=visual)
        end = time.process_time()
        print(
            f"{len(facts)} rows at {max_tokens} tokens: visual plan {len(facts) / (middle - start):,.0f} rows/s, draw, pack and order "
            f"{len(facts) / (end - middle):,.0f} rows/s; {plan.packs} packs, fill {plan.summary().fill:.4f}, "
            f"costliest pack of a step {plan.summary().cost_spread:.3f} of the mean"
        )


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 300_000
    packing(samples)
    columns(max(samples // 30_000, 1) * 30_000)
