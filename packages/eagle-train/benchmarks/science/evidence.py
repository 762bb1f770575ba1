"""How often what a question asks for is in what the model is given: the accuracy that frames and cut texts leave, apart from guesses.

    python evidence.py --work results/work     # after run.py --out results

A table of the arms of `video` and `text`: frames that are read, and the share of questions whose cards are all on frames that are read, or
whose code is in the text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clips import FPS
from data import CODE, Amounts, batches_of
from experiments import Run, all_runs
from sizes import SIZES

ARMS = ("video-longest-0", "text-ads-0", "text-fixed-0")
Cards = tuple[Sequence[int], int]
"""First frames of the cards of a video, and how many frames each is shown."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder of data and runs of run.py.")
    parser.add_argument("--size", choices=SIZES, default="small", help="As given to run.py.")
    given = parser.parse_args()
    root = given.work.absolute() / "data"
    cards = cards_of(root)
    print("| arm | source | most frames | frames | evidence is given |\n|---|---|---|---|---|")
    for run in all_runs(root, (0,), SIZES[given.size]):
        if run.name in ARMS:
            for line in lines(run, cards):
                print(f"| {run.experiment} {run.arm} | {line}", flush=True)


def cards_of(root: Path) -> dict[str, Cards]:
    """By the path of the video, for held-out videos."""
    found = {}
    for batch in batches_of(root, Amounts()):
        if batch.folder.name.startswith(("test-", "noted-")):
            texts = ((batch.folder / name).read_text().splitlines() for name in ("rows.jsonl", "needles.jsonl"))
            for row, needle in zip(*texts, strict=True):
                video = (batch.folder / json.loads(row)["video"]).relative_to(root)
                found[str(video)] = json.loads(needle)["starts"], batch.card
    return found


def seen(times: Iterable[float], cards: Cards) -> bool:
    """Whether some frame of each card is among the frames at `times` (seconds)."""
    frames = {round(time * FPS) for time in times}
    starts, length = cards
    return all(not frames.isdisjoint(range(start, start + length)) for start in starts)


def lines(run: Run, cards: dict[str, Cards]) -> Iterable[str]:
    """Rows of the table, by source and number of frames; planned as evaluation plans them."""
    from eagle_train.config import parse_config
    from eagle_train.data.prepare import prepare
    from eagle_train.planning.visual import plan_visual, sample_plan, visual_spec
    from eagle_train.runs.evaluate import with_frames
    from eagle_train.training.model import load_run_tokenizer
    from eagle_train.training.sizes import model_sizes

    config = parse_config(run.config)
    tokenizer = load_run_tokenizer(config)
    facts = prepare(config, tokenizer, evaluation=True).facts
    rows = [(source, row) for source, given in run.config["data"]["eval_sources"].items() for row in _rows(given["annotation"])]
    for frames in run.frames or (None,):
        spec = with_frames(visual_spec(config, model_sizes(config, tokenizer)), frames)
        plans = plan_visual(facts, config.stages[-1].max_tokens, spec)
        found: dict[str, list[tuple[int, bool]]] = {}
        for index, (source, row) in enumerate(rows):
            video = sample_plan(facts, plans, index, spec).videos[0]
            question, answer = (turn["value"] for turn in row["conversations"][:2])
            if question.endswith(CODE):
                given = f"the code is {answer}" in question
            else:
                assert video.times is not None  # the plan of a file, not of a list of images
                given = seen(video.times, cards[row["video"]])
            found.setdefault(source, []).append((video.count, given))
        for source, pairs in found.items():
            if frames is not None and source not in run.swept:
                continue
            counts, shares = zip(*pairs)
            read = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
            yield f"{source} | {frames or ''} | {read} | {sum(shares) / len(shares):.3f} |"


def _rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
