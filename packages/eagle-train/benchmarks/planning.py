"""Fill and balance of packs, compared with other packing rules, and the speed of planning.

    python packages/eagle-train/benchmarks/planning.py [SAMPLES] [--out FILE.json]

Distributions at 16K tokens: short images (1-13 tiles of 256 tokens and a question), mixed (a tenth documents of 2-8K, a tenth of any length
up to 16K), video-heavy (85 % videos of 30-60 frames, most longer than half a pack). Rivals, in order of arrival: worst fit into the
emptiest open pack (the rule of the original code), online best fit; and best fit decreasing over all samples. `fill`: tokens of the samples
over the capacity of the packs; `cost_spread`: standard deviation of the packs' costs over their mean; `costliest_of_step`: the cost of the
costliest pack of a step over the mean of the step.
"""

import argparse
import heapq
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_model.prompt.costs import FrameCosts
from eagle_model.visual import VisualSpec
from eagle_sampling import TimeTable
from eagle_train.config import StageConfig
from eagle_train.data.facts import SCHEMA, Facts, FactsSource
from eagle_train.planning.packing import _best_fit, pack, sample_costs
from eagle_train.planning.stages import plan_stage
from eagle_train.planning.visual import plan_visual

CAPACITY = 16384
METRICS = {
    "fill": Metric("", "higher"),
    "cost_spread": Metric("", "lower"),
    "costliest_of_step": Metric("", "lower"),
    "rows_per_cpu_s": Metric("", "higher"),
    "packs": Metric("", "none"),
}


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
    """Pack of each sample: the emptiest pack if the sample fits into it, else a new one."""
    open_packs: list[tuple[int, int]] = []  # (minus the free tokens, pack)
    bins, count = [], 0
    for length in lengths.tolist():
        if open_packs and -open_packs[0][0] >= length:
            free, index = heapq.heappop(open_packs)
        else:
            free, index = -CAPACITY, count
            count += 1
        heapq.heappush(open_packs, (free + length, index))
        bins.append(index)
    return np.array(bins)


def describe(lengths: np.ndarray, bins: np.ndarray) -> dict[str, float]:
    count = int(bins.max()) + 1
    costs = np.bincount(bins, weights=sample_costs(lengths))
    return {"fill": lengths.sum() / (count * CAPACITY), "cost_spread": costs.std() / costs.mean(), "packs": count}


def packing(result: Result, count: int) -> None:
    rng = np.random.default_rng(0)
    for name, distribution in (("short images", short_images), ("mixed", mixed), ("video-heavy", video_heavy)):
        lengths = distribution(rng, count).astype(np.int64)
        falling = np.sort(lengths)[::-1]
        details = {"samples": count, "mean_tokens": float(lengths.mean())}
        result.add(name, "worst fit, online", details, **describe(lengths, worst_fit(lengths)))
        result.add(name, "best fit, online", details, **describe(lengths, _best_fit(lengths, CAPACITY)[0]))
        result.add(name, "best fit, decreasing", details, **describe(falling, _best_fit(falling, CAPACITY)[0]))
        start = time.process_time()
        packs = pack(lengths, CAPACITY, seed=1)
        seconds = time.process_time() - start
        bins = np.empty(count, np.int64)
        bins[packs.items] = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
        result.add(name, "ours", details, **describe(lengths, bins), rows_per_cpu_s=count / seconds)


def facts_of(count: int) -> Facts:
    """Rows: a third text, a third single images, a sixth three images, a sixth videos of 30 seconds; all image sizes differ."""
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
        columns["media_group"].append(0)
        columns["image_width"].append(rng.integers(100, 3000, images).tolist())
        columns["image_height"].append(rng.integers(100, 3000, images).tolist())
        values = {
            "frames": 300,
            "seconds": 30.0,
            "last_time": 29.9,
            "start": None,
            "end": None,
            "fps": None,
            "width": 640,
            "height": 360,
            "times": table,
        }
        for name, value in values.items():
            columns[f"video_{name}"].append([value] if video else [])
    small = pa.table(columns, schema=SCHEMA)
    costs = FrameCosts(tuple(tuple(14 + row + column for column in range(8)) for row in range(8)))
    whole = pa.concat_tables([small] * (count // base)).combine_chunks()
    return Facts(whole, (FactsSource("all", Path("all"), Path("."), 0, len(whole), 0, 1.0, 1.0, None),), costs, None, "key")


def columns(result: Result, count: int) -> None:
    facts, spec = facts_of(count), VisualSpec()
    for max_tokens in (32768, 131072):
        start = time.process_time()
        visual = plan_visual(facts, max_tokens, spec)
        middle = time.process_time()
        stage = StageConfig.model_validate({"name": "s", "max_tokens": max_tokens})
        plan = plan_stage(facts, stage, spec, visual=visual)
        end = time.process_time()
        result.add(f"visual plan, {max_tokens} tokens", rows_per_cpu_s=len(facts) / (middle - start))
        summary = plan.summary()
        result.add(
            f"draw, pack and order, {max_tokens} tokens", details={"rows": len(facts)},
            rows_per_cpu_s=len(facts) / (end - middle), fill=summary.fill, packs=plan.packs, costliest_of_step=summary.cost_spread,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="?", type=int, default=300_000, metavar="SAMPLES", help="default: 300000")
    add_out(parser)
    options = parser.parse_args()
    result = Result("eagle-train/planning", environment(("numpy", "pyarrow")), METRICS, settings={"samples": options.samples})
    packing(result, options.samples)
    columns(result, max(options.samples // 30_000, 1) * 30_000)
    report(result, options.out)


if __name__ == "__main__":
    main()
