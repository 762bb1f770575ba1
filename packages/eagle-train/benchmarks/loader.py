"""Does reading keep up with a GPU? The loader feeds a clock: each step sleeps as long as one H200 would compute.

Rate (shared facts of the project): at 32K one H200 takes about 27 tiles a second, which is 126 tiles of 448 px and 4.7 s a pack. Three
workloads: `images` (JPEG photographs of 2 megapixels, 12 + 1 tiles each, nine to a pack), `videos` (120 frames of a ten-minute H.264
video with B-frames, one to a pack) and `mixed` (a pack of each in turn). Says which share of the time the step waited for data, what
reading cost in CPU seconds (so: how many cores one GPU needs), and the most bytes that were read ahead.

    python benchmarks/loader.py [--workload mixed] [--workers 8] [--steps 40] [--speed 4] [--media FOLDER]

`--speed 4`: as if a consumer four times as fast had to be fed. Each run adds its line to `results/loader.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

from eagle_model.tokenizer import train_tokenizer
from eagle_sampling import Limits
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare
from eagle_train.loading.loader import Loader, Reading, Task
from eagle_train.loading.pack import Planned, address_of
from eagle_train.planning.stages import StageSchedule
from eagle_train.planning.visual import ModelFacts

sys.path.append(str(Path(__file__).parents[2] / "eagle-sampling" / "benchmarks"))
from make_videos import FOLDER, make

TILES_PER_SECOND = 27.0
MODEL = ModelFacts(448, 256)
RESULTS = Path(__file__).parent / "results" / "loader.jsonl"


def make_rows(folder: Path, media: Path, workload: str, count: int) -> None:
    """`rows.jsonl` with `count` packs' worth of rows, and the photographs that they name."""
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
    """CPU seconds so far of this process, and of its reading processes (Linux; 0 elsewhere)."""
    readers = 0.0
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        readers += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.process_time(), readers


def run(given: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One run; the figures."""
    make_rows(folder, Path(given.media), given.workload, given.steps)
    tokenizer = train_tokenizer(["what? noise"], 512)
    tokenizer.save_pretrained(folder / "tokenizer")
    stage = {"name": "32k", "max_tokens": "32K", "steps": given.steps, "packs_per_step": 1}
    config = parse_config(
        {
            "run": {"name": "loader"},
            "data": {"sources": {"all": {"annotation": "rows.jsonl"}}},
            "sampling": {"max_frames": 120},
            "stages": [stage],
        },
        base=folder,
    )
    facts = prepare(config, tokenizer).facts
    schedule = StageSchedule(facts, config, config.stages[0], MODEL)

    def tasks() -> Iterator[Task]:
        for step in range(given.steps):
            plan, place = schedule.locate(step)
            for pack in plan.packs_of(place):
                yield Task(step, tuple(Planned(address_of(facts, sample.row), sample) for sample in plan.samples(pack)), "sqrt")

    reading = Reading(str(folder / "tokenizer"), MODEL, True, Limits())
    with Loader(tasks(), reading, workers=given.workers, prefetch=given.prefetch << 20) as loader:
        first = loader.get()  # starting the processes and reading the first pack are a run's, not a step's
        assert first is not None
        waited, begin, (parent, readers) = loader.waited, time.monotonic(), cpu_seconds()
        waits, tiles, most = [], 0, 0
        batch = first[1]
        while True:
            for _ in range(20):  # the step: sleep, and look now and then at how much is read ahead
                time.sleep(len(batch.tiles) / (TILES_PER_SECOND * given.speed) / 20)
                most = max(most, loader.bytes_ahead)
            tiles += len(batch.tiles)
            before = loader.waited
            item = loader.get()
            if item is None:
                break
            batch = item[1]
            waits.append(loader.waited - before)
        elapsed = time.monotonic() - begin
        after = cpu_seconds()
        waited = loader.waited - waited
    return {
        "workload": given.workload,
        "data_wait": round(waited / elapsed, 4),
        "longest_wait_s": round(max(waits), 3),
        "steps_that_waited_10ms": sum(wait > 0.01 for wait in waits),
        "steps": len(waits) + 1,
        "tiles_per_second": round(tiles / elapsed, 1),
        "tiles_per_step": round(tiles / (len(waits) + 1), 1),
        "seconds": round(elapsed, 1),
        "reader_cpu_per_s": round((after[1] - readers) / elapsed, 3),
        "parent_cpu_per_s": round((after[0] - parent) / elapsed, 3),
        "bytes_ahead_MiB": round(most / 2**20),
        "bound_MiB": given.prefetch,
        "workers": given.workers,
        "speed": given.speed,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def main() -> None:
    """Make data, run, print one JSON line and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["images", "videos", "mixed"], default="mixed")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--prefetch", type=int, default=1024, help="MiB")
    parser.add_argument("--media", default=str(FOLDER), help="folder of the benchmark videos; made when they aren't there")
    parser.add_argument("--dry", action="store_true", help="print the line without keeping it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        line = json.dumps(run(given, Path(name)))
    print(line)
    if not given.dry:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
