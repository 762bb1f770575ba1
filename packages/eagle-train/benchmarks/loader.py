"""Does reading keep up with a GPU? The loader feeds a clock: each step sleeps as long as one H200 computes.

At 32K tokens one H200 processes about 27 tiles per second: 126 tiles of 448 px and 4.7 s per pack. Workloads: `images` (JPEG photographs of
2 megapixels, 12 + 1 tiles each, nine per pack), `videos` (120 frames of a ten-minute H.264 video with B-frames, one per pack) and `mixed`
(packs of both in turn). Measures the share of the time in which the step waited for data (`data_wait`), the CPU seconds of reading per
second (the cores that one GPU needs), and the largest number of bytes that were read ahead.

    python packages/eagle-train/benchmarks/loader.py [--workload mixed] [--workers 8] [--steps 40] [--speed 4] [--media FOLDER]
        [--out FILE.json]

`--speed 4`: a consumer that is four times as fast.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_model.tokenizer import train_tokenizer
from eagle_model.visual import VisualSpec
from eagle_sampling import Limits
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare
from eagle_train.loading.loader import Loader, Reading, Task
from eagle_train.planning.stages import StageSchedule

sys.path.append(str(Path(__file__).parents[2] / "eagle-sampling" / "benchmarks"))
from make_videos import FOLDER, make

TILES_PER_SECOND = 27.0
SPEC = VisualSpec(max_frames=120)
METRICS = {
    "data_wait": Metric("share of the time", "lower"),
    "longest_wait_s": Metric("s", "lower"),
    "steps_that_waited_10ms": Metric("", "lower"),
    "tiles_per_s": Metric("", "higher"),
    "reader_cpu_per_s": Metric("", "lower"),
    "parent_cpu_per_s": Metric("", "lower"),
    "ahead_mib": Metric("MiB", "none"),
    "tiles_per_step": Metric("", "none"),
    "steps": Metric("", "none"),
    "seconds": Metric("s", "none"),
}


def make_rows(folder: Path, media: Path, workload: str, count: int) -> None:
    """`rows.jsonl` with the rows of `count` packs, and the photographs that they name."""
    rng = np.random.default_rng(0)
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]
    rows = []
    if workload != "videos":
        for index in range(36):
            small = rng.integers(0, 256, (45, 60, 3), dtype=np.uint8)
            Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
        packs = count if workload == "images" else count // 2
        rows += [{"image": f"{index % 36}.jpg", "conversations": talk} for index in range(9 * packs)]
    if workload != "images":
        packs = count if workload == "videos" else count - count // 2
        rows += [{"video": str(make(media, ["360p-10min.mp4"]) / "360p-10min.mp4"), "conversations": talk}] * packs
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds so far of this process, and of its reading processes (Linux; 0 on other systems)."""
    readers = 0.0
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        readers += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.process_time(), readers


def run(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The metrics of one run."""
    make_rows(folder, Path(given.media), given.workload, given.steps)
    tokenizer = train_tokenizer(["what? noise"], 512)
    tokenizer.save_pretrained(folder / "tokenizer")
    stage = {"name": "32k", "max_tokens": "32K", "steps": given.steps, "packs_per_step": 1}
    config = parse_config(
        {
            "run": {"name": "loader"},
            "data": {"sources": {"all": {"annotation": "rows.jsonl"}}},
            "stages": [stage],
        },
        base=folder,
    )
    facts = prepare(config, tokenizer).facts
    schedule = StageSchedule(facts, config, config.stages[0], SPEC)

    def tasks() -> Iterator[Task]:
        for step in range(given.steps):
            plan, place = schedule.locate(step)
            for pack in plan.packs_of(place):
                yield Task(step, tuple(plan.samples(pack)), "sqrt")

    reading = Reading(str(folder / "tokenizer"), SPEC, Limits())
    with Loader(tasks(), reading, workers=given.workers, prefetch=given.prefetch << 20) as loader:
        first = loader.get()  # starts the processes and reads the first pack, once per run
        assert first is not None
        waited, begin, (parent, readers) = loader.waited, time.monotonic(), cpu_seconds()
        waits, tiles, most = [], 0, 0
        tiles_now = len(first[1].batch.tiles)
        while True:
            for _ in range(20):  # the step: sleep, and read the number of bytes ahead 20 times
                time.sleep(tiles_now / (TILES_PER_SECOND * given.speed) / 20)
                most = max(most, loader.bytes_ahead)
            tiles += tiles_now
            before = loader.waited
            item = loader.get()
            if item is None:
                break
            tiles_now = len(item[1].batch.tiles)
            waits.append(loader.waited - before)
        elapsed = time.monotonic() - begin
        after = cpu_seconds()
        waited = loader.waited - waited
    return {
        "data_wait": waited / elapsed,
        "longest_wait_s": max(waits),
        "steps_that_waited_10ms": sum(wait > 0.01 for wait in waits),
        "tiles_per_s": tiles / elapsed,
        "reader_cpu_per_s": (after[1] - readers) / elapsed,
        "parent_cpu_per_s": (after[0] - parent) / elapsed,
        "ahead_mib": most / 2**20,
        "tiles_per_step": tiles / (len(waits) + 1),
        "steps": len(waits) + 1,
        "seconds": elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["images", "videos", "mixed"], default="mixed")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--prefetch", type=int, default=1024, help="MiB")
    parser.add_argument("--media", default=str(FOLDER), help="folder of the benchmark videos, which are made if they are missing")
    add_out(parser)
    given = parser.parse_args()
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "media")}
    result = Result("eagle-train/loader", environment(("numpy", "pillow", "av", "pyarrow")), METRICS, settings=settings)
    with tempfile.TemporaryDirectory() as name:
        result.add(f"{given.workload}, {given.workers} workers, speed {given.speed:g}", **run(given, Path(name)))
    report(result, given.out)


if __name__ == "__main__":
    main()
