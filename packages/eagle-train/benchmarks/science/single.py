"""One run in a process of its own: train, evaluate at every number of frames, write the result as JSON."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import Run


def run_one(run: Run, folder: Path, device: str, exported: bool) -> dict[str, Any]:
    """Train and evaluate, with one CPU thread. exported: the model is written to `folder/NAME/model`, for runs that start from it."""
    begin = time.time()
    import torch

    from eagle_train.config import parse_config
    from eagle_train.distributed.world import start_world
    from eagle_train.evaluation.metrics import Evaluation
    from eagle_train.runs.evaluate import Evaluator
    from eagle_train.runs.export import export
    from eagle_train.runs.ready import get_ready
    from eagle_train.runs.sweep import Point
    from eagle_train.runs.train import train

    torch.set_num_threads(1)
    content = run.config | {"run": {"name": run.name, "dir": str(folder), "seed": run.seed, "log_every": 1}}
    if run.after is not None:
        kept = {key: value for key, value in content["model"].items() if key not in ("preset", "tokenizer", "overrides")}
        content["model"] = kept | {"path": str(folder / run.after / "model")}
    config = parse_config(content)
    world = start_world(config.parallel, device)
    ready = get_ready(config, world)
    records: list[dict[str, Any]] = []
    started = time.time()
    # Evaluations within training would be of all sources at the end of every stage: one at the end is enough.
    trained = train(replace(ready, eval_facts=None), world, on_record=records.append)
    seconds = time.time() - started
    trainer = trained.trainer
    evaluator = Evaluator(ready, world)

    def evaluate(sources: Sequence[str], frames: int | None) -> Evaluation:
        return evaluator.evaluate(trainer.model, trainer.total_steps, sources=sources, frames=frames)

    once = [name for name in config.data.eval_sources if name not in run.swept]
    points = [Point(None, None, evaluate(once, None)), *(Point(frames, None, evaluate(run.swept, frames)) for frames in run.frames)]
    evaluated = time.time() - started - seconds
    if exported:
        export(config, folder / run.name / "model", dtype="float32")
    shutil.rmtree(trainer.checkpoints)  # several gigabytes in all
    steps = [record for record in records if "loss" in record and "step" in record]
    last = steps[-max(1, len(steps) // 20) :]
    result = {
        "experiment": run.experiment,
        "arm": run.arm,
        "seed": run.seed,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.total_steps,
        **{key: sum(record[key] for record in steps) for key in ("tokens", "tiles", "samples", "labels", "missing")},
        "loss": sum(record["loss"] for record in last) / max(1, len(last)),
        "losses": [round(record["loss"], 4) for record in steps[:: max(1, len(steps) // 40)]],
        "seconds": {"start": round(started - begin, 1), "train": round(seconds, 1), "evaluate": round(evaluated, 1)},
        "points": [row for point in points for row in point.rows()],
    }
    world.close()
    return result


def write_result(result: dict[str, Any], path: Path) -> None:
    """Written under another name first: the driver reads it while this process ends."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.rename(path)
