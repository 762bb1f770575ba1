"""A small run that trains in a second."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from eagle_train.config import Config, parse_config
from eagle_train.data.ledger import Ledger
from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.trainer import Trainer
from eagle_train.watching import preview

from . import media
from .models import byte_tokenizer


def colour_run_in(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int = 24, **sections: Any) -> Config:
    """A small run of a tiny model in a folder: coloured images in one and in many tiles, a video, two short stages."""
    tokenizer.save_pretrained(folder / "tokenizer")
    colours = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
    content = []
    for index in range(rows):
        name = list(colours)[index % 3]
        Image.new("RGB", (32, 32) if index % 2 else (64, 32), colours[name]).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>what color?"}, {"from": "gpt", "value": name}]
        content.append({"image": f"{index}.png", "conversations": turns})
    frames = (media.random_pixels(index, (64, 48)) for index in range(20))
    media.write_video(folder / "clip.mp4", frames, 10, {"g": "10", "preset": "ultrafast"}, {"movflags": "faststart"})
    content.append({"video": "clip.mp4", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    defaults: dict[str, Any] = {
        "run": {"name": "run"},
        "model": {
            "preset": "tiny",
            "tokenizer": "tokenizer",
            "overrides": {
                "vision_config": small | {"image_size": 32, "patch_size": 8},
                "text_config": small | {"num_key_value_heads": 2},
            },
        },
        "data": {"sources": {"rows": {"annotation": "rows.jsonl"}}, "workers": 1},
        "stages": [
            {"name": "one", "max_tokens": 640, "steps": 4, "packs_per_step": 2, "lr": 1e-3},
            {"name": "two", "max_tokens": 1280, "steps": 2, "packs_per_step": 2, "lr": 1e-3, "train": ["connector", "language"]},
        ],
        "parallel": {"dtype": "float32"},
        "loader": {"workers": 0},
        "checkpoint": {"every": 3, "keep": 1},
    }
    return parse_config({**defaults, **sections}, base=folder)


def colour_sources(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `colour_sources_run`, written with their media: `rows.jsonl`, and `held_out.jsonl` with one image that is missing."""
    colour_run_in(folder, byte_tokenizer(), rows=6)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    held_out = [rows[0], rows[1], rows[-1], {"image": "gone.png", "conversations": rows[0]["conversations"]}]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return rows, held_out


def colour_sources_run(folder: Path, name: str, rows: str, held_out: str, **data: Any) -> Config:
    """A run of three steps on the files of `colour_sources`, in any format and at any place, with an evaluation."""
    sources = {"sources": {"rows": {"annotation": rows}}, "eval_sources": {"held": {"annotation": held_out}}}
    return colour_run_in(
        folder,
        byte_tokenizer(),
        rows=6,
        run={"name": name, "seed": 3},
        data={**sources, "workers": 1, "facts": f"facts-{name}", **data},
        eval={"batch_size": 3, "max_new_tokens": 3, "every": 2},
        stages=[{"name": "one", "max_tokens": 640, "steps": 3, "packs_per_step": 1, "lr": 1e-3}],
        checkpoint={"every": 1, "keep": 1},
    )


class _Stopped(BaseException):
    """Something ends the run."""


def train_in_parts(config: Config, *, stop_at: int | None) -> Trainer:
    """Train, in two parts if a step is named, after whose record and before whose checkpoint the first ends."""
    torch.set_num_threads(1)

    def stop(record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["total_step"] == stop_at:
            raise _Stopped

    world = start_world(config.parallel, "cpu")
    if stop_at is not None:
        with contextlib.suppress(_Stopped):
            train(get_ready(config), world, on_record=stop)
            raise AssertionError("the run was not stopped")
    return train(get_ready(config), world).trainer


def outcome(config: Config, trainer: Trainer) -> dict[str, Any]:
    """What must not depend on where the rows stand, and how they are written: weights, losses, answers, ledger, and the page of a row."""
    records = [{**record} for record in Metrics(config.run.folder / "metrics.jsonl") if record["kind"] in ("eval", "final")]
    for record in records:
        for key in ("seconds", "time"):
            record.pop(key, None)
    entries = Ledger(config.run.folder / "ledger.jsonl")
    shown = preview.view(config, row="rows:2", stage=None, pack=0, evaluation=False)
    return {
        "weights": {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()},
        "steps": same_run(Metrics(config.run.folder / "metrics.jsonl")),
        "evaluations": records,
        "ledger": [(entry.source, entry.line, entry.reason, entry.where) for entry in entries],
        "shown": [(one.pieces, one.length, one.labels, one.notes) for one in shown.views],
    }
