"""Does reading keep up with a GPU? The loader feeds a clock: each step sleeps as long as one H200 would compute.

Rate (shared facts of the project): at 32K one H200 takes about 27 tiles a second, which is 126 tiles of 448 px and 4.7 s a pack. Real
files are made first: JPEG photographs of 2 megapixels cut into 12 + 1 tiles, and H.264 videos of ten minutes whose packs ask for 120
frames. Reports the share of time that the step waited for data, as the trainer would.

    python benchmarks/loader.py --workers 8 --steps 40 [--speed 4]     # --speed 4: as if four times as fast a consumer had to be fed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from eagle_model.tokenizer import train_tokenizer
from eagle_sampling import Limits
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare
from eagle_train.planning.stages import StageSchedule
from eagle_train.planning.visual import ModelFacts
from eagle_train.training.batch import Planned, address_of
from eagle_train.training.loader import Loader, Reading, Task

TILES_PER_SECOND = 27.0
MODEL = ModelFacts(448, 256)


def make_data(folder: Path, images: int, videos: int, minutes: float) -> None:
    """Rows of single photographs and of videos, half of the packs' tiles each."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(images):
        small = rng.integers(0, 256, (45, 60, 3), dtype=np.uint8)
        Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
        rows.append({"image": f"{index}.jpg", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]})
    for index in range(videos):
        with av.open(str(folder / f"{index}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "250"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            scenes = [
                np.asarray(Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize((640, 360), Image.Resampling.BICUBIC))
                for _ in range(8)
            ]
            for number in range(int(minutes * 60 * 25)):
                frame = av.VideoFrame.from_ndarray(np.roll(scenes[number // 125 % 8], number % 640, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        rows.append({"video": f"{index}.mp4", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Make data, run, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--speed", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, given.images, given.videos, given.minutes)
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

        def tasks():
            for step in range(given.steps):
                plan, place = schedule.locate(step)
                for pack in plan.packs_of(place):
                    yield Task(step, tuple(Planned(address_of(facts, sample.row), sample) for sample in plan.samples(pack)), "sqrt")

        reading = Reading(str(folder / "tokenizer"), MODEL, True, Limits())
        with Loader(tasks(), reading, workers=given.workers, prefetch=2 << 30) as loader:
            first = loader.get()  # starting the processes and the first pack are a run's, not a step's
            assert first is not None
            waited, begin, tiles = loader.waited, time.monotonic(), 0
            for _, batch in loader:
                tiles += len(batch.tiles)
                time.sleep(len(batch.tiles) / (TILES_PER_SECOND * given.speed))
            elapsed = time.monotonic() - begin
            share = (loader.waited - waited) / elapsed
    print(
        json.dumps(
            {
                "data_wait": round(share, 4),
                "tiles_per_second": round(tiles / elapsed, 1),
                "tiles": tiles,
                "seconds": round(elapsed, 1),
                "workers": given.workers,
                "speed": given.speed,
                "cpus": os.cpu_count(),
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
