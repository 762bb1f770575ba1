"""bf16 training on one GPU with activations kept, recomputed, selected and offloaded: the same run by the trainer, once for each
entry of `--order`.

    python packages/eagle-train/benchmarks/activations.py [--steps 30] [--tokens 8192] [--order keep recompute selective offload keep]
        [--deterministic] [--out FILE.json]

The data are generated images of one shape in one colour, with their names as answers; the model is a reduced `1b` with random weights.
Prints the losses of the runs next to each other, and the time and memory of each. Fails if a loss does not fall, if the first step's losses
differ, or, with --deterministic, if losses or gradient norms of two runs differ in any bit. Without --deterministic the backward of
attention adds in any order, so later losses differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_model.activation_checkpointing import MODES
from eagle_model.tokenizer import train_tokenizer
from eagle_train.config import parse_config
from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}
SHAPES = ("circle", "square")
GIB = 1 << 30
METRICS = {
    "ms": Metric("ms per step", "lower"),
    "peak_gib": Metric("GiB", "lower"),
    "host_gib": Metric("GiB", "none"),
    "tokens": Metric("per step", "none"),
    "largest_difference": Metric("of a loss to the first run's", "none"),
    "seconds": Metric("s", "none"),
}


def make_data(folder: Path, rows: int) -> None:
    """Images of 640 x 480 with one shape each, and its name as the answer."""
    lines = []
    for index in range(rows):
        colour, shape = list(COLOURS)[index % 4], SHAPES[index // 4 % 2]
        picture = Image.new("RGB", (640, 480), (235, 235, 235))
        box = (100 + index % 97, 60 + index % 71, 380 + index % 89, 340 + index % 71)
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
        picture.save(folder / f"{index}.jpg")
        talk = [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": f"a {colour} {shape}"}]
        lines.append(json.dumps({"image": f"{index}.jpg", "conversations": talk}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(["What is this? a red green blue yellow circle square"] * 8, 400).save_pretrained(folder / "tokenizer")


def run(folder: Path, name: str, mode: str, steps: int, tokens: int, device: str, deterministic: bool) -> dict[str, Any]:
    text = {"num_hidden_layers": 8, "vocab_size": 4096}
    values = {
        "run": {"name": name, "deterministic": deterministic},
        "model": {
            "preset": "1b",
            "tokenizer": "tokenizer",
            "activations": mode,
            "overrides": {"vision_config": {"num_hidden_layers": 8}, "text_config": text},
        },
        "data": {"sources": {"rows": {"annotation": "rows.jsonl"}}, "facts": "facts", "workers": 4},
        "tiling": {"max_tiles": 1},
        "stages": [{"name": "only", "max_tokens": tokens, "steps": steps, "packs_per_step": 1, "lr": 2e-4, "warmup_ratio": 0.1}],
        "loader": {"workers": 4},
        "checkpoint": {"every": 1_000_000},
    }
    config = parse_config(values, base=folder)
    records: list[dict[str, Any]] = []
    world = start_world(config.parallel, device)
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    trainer = train(get_ready(config), world, on_record=records.append).trainer
    taken = time.perf_counter() - begin
    steps_made = [record for record in records if record["kind"] == "step"]
    host = trainer.engine.arena.capacity if trainer.engine is not None else 0
    dtypes = {str(parameter.dtype) for parameter in trainer.model.parameters()}
    world.close()
    return {
        "mode": mode,
        "deterministic": deterministic,
        "losses": [record["loss"] for record in steps_made],
        "norms": [record["grad_norm"] for record in steps_made],
        "ms": statistics.median(record["seconds"] for record in steps_made[3:]) * 1e3,
        "tokens": statistics.mean(record["tokens"] for record in steps_made),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
        "host_gib": host / GIB,
        "master_weights": sorted(dtypes),
        "seconds": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--order", nargs="+", default=["keep", "recompute", "selective", "offload", "keep"], choices=MODES)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--device", default="cuda")
    add_out(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, options.rows)
        found = []
        for turn, mode in enumerate(options.order):
            found.append(run(folder, f"{turn}-{mode}", mode, options.steps, options.tokens, options.device, options.deterministic))
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
    print("step  " + "  ".join(f"{row['mode']:>10}" for row in found))
    for index, losses in enumerate(zip(*(row["losses"] for row in found))):
        print(f"{index + 1:4}  " + "  ".join(f"{loss:10.4f}" for loss in losses))
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = Result("eagle-train/activations", environment(("torch", "triton", "transformers", "flash-attn-4")), METRICS, settings=settings)
    for turn, row in enumerate(found):
        difference = max(abs(a / b - 1) for a, b in zip(row["losses"], found[0]["losses"]))
        details = {name: row[name] for name in ("losses", "norms", "master_weights")}
        metrics = {name: row[name] for name in ("ms", "peak_gib", "host_gib", "tokens", "seconds")}
        result.add(f"run {turn + 1}, {row['mode']}", details=details, **metrics, largest_difference=difference)
    report(result, options.out)
    for row in found:
        tail = statistics.mean(row["losses"][-3:])
        if not tail < 0.7 * row["losses"][0]:
            raise SystemExit(f"{row['mode']}: the loss does not fall: {row['losses'][0]:.3f} to {tail:.3f}")
        if row["losses"][0] != found[0]["losses"][0]:
            raise SystemExit(f"{row['mode']}: the first loss is {row['losses'][0]!r}, not {found[0]['losses'][0]!r}")
        if options.deterministic and (row["losses"], row["norms"]) != (found[0]["losses"], found[0]["norms"]):
            raise SystemExit(f"{row['mode']}: losses or gradient norms differ from {found[0]['mode']}'s")


if __name__ == "__main__":
    main()
