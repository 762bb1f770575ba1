"""What reading costs when rows share a medium: seven questions about clips of a video, as separate rows and as trees.

    python packages/eagle-train/benchmarks/shared_reading.py VIDEO [--clips 8] [--questions 7] [--max-tokens 32768] [--out FILE.json]

One process reads every pack of an epoch, decoding included; seconds are CPU time of one thread, the best of two epochs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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

METRICS = {
    "frames_per_row": Metric("read", "lower"),
    "cpu_s_per_row": Metric("s", "lower"),
    "tokens_per_row": Metric("", "lower"),
    "rows": Metric("", "none"),
    "packs": Metric("", "none"),
}
SECONDS = 60.0


def run(folder: Path, share_media: bool, max_tokens: int) -> dict[str, float]:
    config = parse_config(
        {
            "run": {"name": "reading"},
            "data": {"sources": {"all": {"annotation": "rows.jsonl"}}},
            "packing": {"share_media": share_media},
            "stages": [{"name": "one", "max_tokens": max_tokens, "packs_per_step": 1}],
        },
        base=folder,
    )
    tokenizer = train_tokenizer(["What happens in part 1? Part 1 of the film."], 512)
    tokenizer.save_pretrained(folder / "tokenizer")
    spec = VisualSpec()
    schedule = StageSchedule(prepare(config, tokenizer).facts, config, config.stages[0], spec)
    plan = schedule.plan(0)

    def tasks() -> Iterator[Task]:
        for pack in range(plan.packs):
            yield Task(pack, tuple(plan.samples(pack)), "sqrt")

    best, frames, tokens, rows = float("inf"), 0, 0, 0
    for _ in range(2):
        frames = tokens = rows = 0
        begin = time.process_time()
        with Loader(tasks(), Reading(str(folder / "tokenizer"), spec, Limits()), workers=0) as loader:
            while (item := loader.get()) is not None:
                pack = item[1]
                assert not pack.missing, pack.missing
                frames += len(pack.batch.tiles)
                tokens += len(pack.batch.input_ids)
                rows += len(plan.samples(item[0]))
        best = min(best, time.process_time() - begin)
    return {
        "frames_per_row": frames / rows,
        "cpu_s_per_row": best / rows,
        "tokens_per_row": tokens / rows,
        "rows": rows,
        "packs": plan.packs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--questions", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=32768)
    add_out(parser)
    given = parser.parse_args()
    if not given.video.is_file():
        parser.error(f"{given.video} is not a file")
    settings = {"clips": given.clips, "questions": given.questions, "max_tokens": given.max_tokens, "seconds of a clip": SECONDS}
    result = Result("eagle-train/shared_reading", environment(("numpy", "av", "pyarrow")), METRICS, settings=settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w") as file:
            for clip in range(given.clips):
                media = {"video": str(given.video.absolute()), "start": clip * SECONDS, "end": (clip + 1) * SECONDS}
                for part in range(given.questions):
                    talk = [
                        {"from": "human", "value": f"What happens in part {part}?"},
                        {"from": "gpt", "value": f"Part {part} of the film."},
                    ]
                    file.write(json.dumps(media | {"conversations": talk}) + "\n")
        for contender, share_media in (("separate rows", False), ("shared media", True)):
            found = run(folder, share_media, given.max_tokens)
            print(contender, found, flush=True)
            result.add(f"{given.questions} questions about each of {given.clips} clips", contender, **found)
    report(result, given.out)


if __name__ == "__main__":
    main()
