"""Does a model learn as well from shared media? The same rows as separate samples and as trees (`packing.share_media`).

A model of 0.3 M parameters learns easy-VQA from random weights: every training image has several rows, each with one question. All arms
train the same rows for the same number of optimizer steps. Separate samples and `same rows` have about as many rows per step; `same tokens`
has about as many tokens per step as separate samples, so more rows. Held-out images are asked what is shown, and questions with one word as
the answer.

    python packages/eagle-train/benchmarks/shared_media.py [--images 1500] [--steps 900] [--seeds 0 1 2] [--device cpu] [--out FILE.json]

Losses are comparable between arms; times only when nothing else runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report, write
from eagle_model.tokenizer import train_tokenizer
from eagle_train.config import parse_config
from eagle_train.distributed.world import start_world
from eagle_train.quickstart import easy_vqa_data as vqa
from eagle_train.quickstart.build import MODEL
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics

MAX_TOKENS = 256
ROWS_PER_STEP = 44
METRICS = {
    "loss": Metric("mean of the last 50 steps", "lower"),
    "held_out_loss": Metric("", "lower"),
    "accuracy": Metric("share of held-out rows", "higher"),
    "rows_per_step": Metric("", "none"),
    "tokens_per_row": Metric("", "lower"),
    "tiles_per_row": Metric("", "lower"),
    "seconds": Metric("s", "lower"),
}


def build(folder: Path, images: int, rng: np.random.Generator) -> dict[str, int]:
    """Annotations, LMDBs and a tokenizer in `folder`; returns the number of rows by file."""
    counts = {}
    for name in ("train", "test"):
        split = vqa.load_split(name)
        kept = sorted(split.paths)[: images if name == "train" else images // 5]
        split = vqa.Split({number: split.paths[number] for number in kept}, {number: split.turns[number] for number in kept})
        vqa.write_images(split, folder / f"{name}.lmdb", 1)
        rows = []
        for number, turns in split.turns.items():
            text = vqa.description(turns)
            if text is None:
                continue
            asked = {turn.question: turn for turn in turns if not vqa.is_yes_or_no(turn)}
            asked[vqa.DESCRIBE] = vqa.Turn(vqa.DESCRIBE, text)
            rows += [vqa.image_row(number, 0, [turn], f"{name}.lmdb") for turn in asked.values()]
        rng.shuffle(rows)
        counts[name] = vqa.write_rows(folder / f"{name}.jsonl", rows)
        if name == "train":
            texts = [turn["value"] for row in rows for turn in row["conversations"]]
            fixed = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n", "<image 1>"]
            train_tokenizer([*texts, *fixed * 100], 448).save_pretrained(folder / "tokenizer")
    return counts


def configuration(folder: Path, name: str, share_media: bool, steps: int, packs_per_step: int, seed: int) -> Any:
    stage = {
        "name": "one", "max_tokens": MAX_TOKENS, "steps": steps, "packs_per_step": packs_per_step, "lr": 1.0e-3, "betas": [0.9, 0.95],
        "schedule": "cosine", "warmup_ratio": 0.05, "loss_weighting": "token",
    }  # fmt: skip
    content = {
        "run": {"name": name, "dir": "runs", "seed": seed},
        "model": {"preset": "tiny", "tokenizer": "tokenizer", "overrides": MODEL},
        "data": {"sources": {"train": {"annotation": "train.jsonl"}}, "eval_sources": {"test": {"annotation": "test.jsonl"}}},
        "stages": [stage],
        "packing": {"share_media": share_media},
        "parallel": {"dtype": "float32"},
        "loader": {"workers": 0},
        "eval": {"batch_size": 64, "max_new_tokens": 12},
    }
    return parse_config(content, base=folder)


def arm(folder: Path, name: str, steps: int, seed: int, device: str, more_rows: float = 1.0) -> dict[str, float]:
    """Train one model and evaluate it; the metrics. more_rows: factor of `ROWS_PER_STEP`."""
    share_media = name != "separate samples"
    name = f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    plan = get_ready(configuration(folder, f"{name}-plan", share_media, 1, 1, seed)).schedules[0].plan(0)
    packs_per_step = max(1, round(more_rows * ROWS_PER_STEP * plan.packs / len(plan.pack_rows)))
    config = configuration(folder, name, share_media, steps, packs_per_step, seed)
    world = start_world(config.parallel, device)
    begin = time.monotonic()
    trained = train(get_ready(config), world)
    seconds = time.monotonic() - begin
    done = trained.final_evaluation()
    assert done is not None, "the evaluation failed"
    record = done.record()
    records = [one for one in Metrics(config.run.folder / "metrics.jsonl") if one["kind"] == "step"]
    samples = sum(one["samples"] for one in records)
    return {
        "loss": float(np.mean([one["loss"] for one in records[-50:]])),
        "held_out_loss": record["losses"]["test"]["loss"],
        "accuracy": record["scores"]["test"]["accuracy"],
        "rows_per_step": samples / len(records),
        "tokens_per_row": sum(one["tokens"] for one in records) / samples,
        "tiles_per_row": sum(one["tiles"] for one in records) / samples,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    add_out(parser)
    options = parser.parse_args()
    settings: dict[str, Any] = {"images": options.images, "steps": options.steps, "max_tokens": MAX_TOKENS, "device": options.device}
    settings["threads"] = torch.get_num_threads()
    gpus = int(options.device == "cuda")
    result = Result("eagle-train/shared_media", environment(("torch", "transformers"), gpus=gpus), METRICS, settings=settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result.settings["rows"] = build(folder, options.images, np.random.default_rng(0))
        for seed in options.seeds:
            tokens: list[float] = []  # per row
            for name in ("separate samples", "shared media, same rows", "shared media, same tokens"):
                metrics = arm(folder, name, options.steps, seed, options.device, tokens[0] / tokens[1] if len(tokens) == 2 else 1.0)
                tokens.append(metrics["tokens_per_row"])
                print(f"seed {seed}", name, metrics, flush=True)
                result.add(f"seed {seed}", name, **metrics)
                if options.out is not None:
                    write(result, options.out)
    report(result, options.out)


if __name__ == "__main__":
    main()
